//! Files at rest: AES-256-GCM in chunks, under a key per file.
//!
//! Layout: a header of 8 bytes (`LETHE` and version 1, then two zero bytes), then chunks. Each chunk is 64 KiB of
//! plain text (the last one less, possibly nothing) followed by its tag of 16 bytes. The nonce of a chunk is its
//! number and whether it is the last one, so that chunks can be neither reordered nor cut off; a chunk can be opened
//! by itself, which is what byte ranges need. The header is authenticated with every chunk.

use std::io::{self, Write};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use bytes::Bytes;

use lethe_domain::crypto::{CryptoError, KEY_LEN};

const HEADER: [u8; 8] = *b"LETHE\x01\0\0";
/// Plain bytes of a chunk.
pub const CHUNK: usize = 64 * 1024;
const TAG: usize = 16;

fn key(bytes: &[u8; KEY_LEN]) -> Result<LessSafeKey, CryptoError> {
    UnboundKey::new(&AES_256_GCM, bytes).map(LessSafeKey::new).map_err(|_| CryptoError::Unopenable)
}

fn nonce(index: u64, last: bool) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&index.to_be_bytes());
    bytes[NONCE_LEN - 1] = u8::from(last);
    Nonce::assume_unique_for_key(bytes)
}

/// Encrypts what is written to it and hands the bytes on, chunk by chunk. A file is whole only after [`Self::finish`].
pub struct Encryptor<S> {
    key: LessSafeKey,
    sink: S,
    buffer: Vec<u8>,
    index: u64,
    plain: u64,
}

impl<S: FnMut(Bytes) -> io::Result<()>> Encryptor<S> {
    /// Encrypts under `key`, which must never encrypt another file; encrypted bytes go to `sink`.
    ///
    /// # Errors
    /// What `sink` says of the header.
    pub fn new(key_bytes: &[u8; KEY_LEN], mut sink: S) -> io::Result<Self> {
        let key = key(key_bytes).map_err(io::Error::other)?;
        sink(Bytes::from_static(&HEADER))?;
        Ok(Self { key, sink, buffer: Vec::with_capacity(CHUNK + TAG), index: 0, plain: 0 })
    }

    fn seal(&mut self, last: bool) -> io::Result<()> {
        let mut chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK + TAG));
        self.plain += chunk.len() as u64;
        self.key
            .seal_in_place_append_tag(nonce(self.index, last), Aad::from(HEADER), &mut chunk)
            .map_err(|_| io::Error::other("a chunk could not be encrypted"))?;
        self.index += 1;
        (self.sink)(chunk.into())
    }

    /// Writes the last chunk; returns the number of plain bytes.
    ///
    /// # Errors
    /// What the sink says.
    pub fn finish(mut self) -> io::Result<u64> {
        self.seal(true)?;
        Ok(self.plain)
    }
}

impl<S: FnMut(Bytes) -> io::Result<()>> Write for Encryptor<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk is sealed only when more follows: the last one may be full, and is marked as the last.
        if self.buffer.len() == CHUNK {
            self.seal(false)?;
        }
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens encrypted files.
pub struct Decryptor {
    key: LessSafeKey,
    plain: u64,
}

impl Decryptor {
    /// For a file of `plain` bytes under `key`.
    ///
    /// # Errors
    /// [`CryptoError::Unopenable`].
    pub fn new(key_bytes: &[u8; KEY_LEN], plain: u64) -> Result<Self, CryptoError> {
        Ok(Self { key: key(key_bytes)?, plain })
    }

    /// The number of chunks.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.plain.div_ceil(CHUNK as u64).max(1)
    }

    /// Where chunk `index` lies in the encrypted file.
    #[must_use]
    pub fn range(&self, index: u64) -> std::ops::Range<u64> {
        let start = index * CHUNK as u64;
        let length = (self.plain - start.min(self.plain)).min(CHUNK as u64) + TAG as u64;
        let offset = HEADER.len() as u64 + index * (CHUNK + TAG) as u64;
        offset..offset + length
    }

    /// Opens the bytes of chunk `index`.
    ///
    /// # Errors
    /// [`CryptoError::Unopenable`] where key, place or bytes are not those that were written.
    pub fn open(&self, index: u64, sealed: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let mut buffer = sealed.to_vec();
        let nonce = nonce(index, index + 1 == self.chunks());
        let opened = self.key.open_in_place(nonce, Aad::from(HEADER), &mut buffer);
        let length = opened.map_err(|_| CryptoError::Unopenable)?.len();
        buffer.truncate(length);
        Ok(buffer)
    }

    /// Opens a whole file, for tests and tools; downloads go chunk by chunk.
    ///
    /// # Errors
    /// [`CryptoError::Unopenable`].
    pub fn open_all(&self, file: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let mut plain = Vec::new();
        let length = usize::try_from(self.range(self.chunks() - 1).end).map_err(|_| CryptoError::Unopenable)?;
        if file.len() != length || !file.starts_with(&HEADER) {
            return Err(CryptoError::Unopenable);
        }
        for index in 0..self.chunks() {
            let range = self.range(index);
            let index_range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
            let (start, end) = index_range.ok_or(CryptoError::Unopenable)?;
            plain.extend(self.open(index, &file[start..end])?);
        }
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encrypt(key: &[u8; KEY_LEN], pieces: &[&[u8]]) -> (Vec<u8>, u64) {
        let mut file = Vec::new();
        let sink = |bytes: Bytes| {
            file.extend_from_slice(&bytes);
            Ok(())
        };
        let mut encryptor = Encryptor::new(key, sink).unwrap();
        for piece in pieces {
            encryptor.write_all(piece).unwrap();
        }
        let plain = encryptor.finish().unwrap();
        (file, plain)
    }

    #[test]
    fn exact_multiples_of_a_chunk_and_nothing_at_all() {
        for size in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let plain: Vec<u8> = (0..=250).cycle().take(size).collect();
            let (file, length) = encrypt(&[7; 32], &[&plain]);
            let decryptor = Decryptor::new(&[7; 32], length).unwrap();
            assert_eq!(decryptor.open_all(&file).unwrap(), plain, "{size}");
        }
    }

    #[test]
    fn a_changed_cut_or_reordered_file_does_not_open() {
        let plain = vec![1; 2 * CHUNK];
        let (file, length) = encrypt(&[7; 32], &[&plain]);
        let decryptor = Decryptor::new(&[7; 32], length).unwrap();
        for position in [0, 8, 100, CHUNK + 20, file.len() - 1] {
            let mut changed = file.clone();
            changed[position] ^= 1;
            assert!(decryptor.open_all(&changed).is_err(), "{position}");
        }
        let shorter = Decryptor::new(&[7; 32], CHUNK as u64).unwrap();
        assert!(shorter.open_all(&file[..8 + CHUNK + TAG]).is_err(), "the last chunk was cut off");
        let mut swapped = file[..8].to_vec();
        swapped.extend_from_slice(&file[8 + CHUNK + TAG..]);
        swapped.extend_from_slice(&file[8..8 + CHUNK + TAG]);
        assert!(decryptor.open_all(&swapped).is_err());
        assert!(Decryptor::new(&[8; 32], length).unwrap().open_all(&file).is_err());
    }

    proptest! {
        #[test]
        fn any_pieces_come_out_as_they_went_in(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..70_000), 0..5)) {
            let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let (file, length) = encrypt(&[9; 32], &slices);
            prop_assert_eq!(Decryptor::new(&[9; 32], length).unwrap().open_all(&file).unwrap(), pieces.concat());
        }
    }
}
