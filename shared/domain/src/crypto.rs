//! Digests, keyed digests and sealing, all from one master key (contract 2, `LETHE_MASTER_KEY_FILE`).
//!
//! Every use has a key of its own, derived by HKDF-SHA-256 with the use as its label.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use aws_lc_rs::{digest, hkdf, hmac};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Bytes of a key.
pub const KEY_LEN: usize = 32;

/// What SHA-256 makes.
pub type Digest = [u8; 32];

/// SHA-256.
#[must_use]
pub fn sha256(bytes: &[u8]) -> Digest {
    let mut digest = [0; 32];
    digest.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    digest
}

/// SHA-1; only to recognise identities that controllers send in this format.
#[must_use]
pub fn sha1(bytes: &[u8]) -> Vec<u8> {
    digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, bytes).as_ref().to_vec()
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Random bytes from the operating system.
///
/// # Errors
/// [`CryptoError::Random`] where it has none.
pub fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| CryptoError::Random)?;
    Ok(bytes)
}

/// What can go wrong with keys.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CryptoError {
    /// Not 32 bytes in base64.
    #[error("a master key is 32 random bytes in base64; make one with `openssl rand -base64 32`")]
    InvalidMasterKey,
    /// Sealed under another key, or changed since.
    #[error("sealed data cannot be opened: it was sealed under another master key, or was changed")]
    Unopenable,
    /// The operating system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    Random,
}

/// All keys at rest. Cheap to share behind an `Arc`; never printed.
pub struct Keys {
    requests: SealingKey,
    days: SealingKey,
    content: hmac::Key,
    groups: hmac::Key,
    tokens: hmac::Key,
    messages: hmac::Key,
    /// Tells one master key from another.
    fingerprint: Vec<u8>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(…)")
    }
}

impl Keys {
    /// Derives all keys from the text of a master key file: 32 bytes, base64.
    ///
    /// # Errors
    /// [`CryptoError::InvalidMasterKey`].
    pub fn from_master_key(text: &str) -> Result<Self, CryptoError> {
        let master = STANDARD.decode(text.trim()).map_err(|_| CryptoError::InvalidMasterKey)?;
        if master.len() != KEY_LEN {
            return Err(CryptoError::InvalidMasterKey);
        }
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"lethe").extract(&master);
        let derive = |label: &str| -> Result<[u8; KEY_LEN], CryptoError> {
            let mut key = [0; KEY_LEN];
            let info = [label.as_bytes()];
            let okm = root.expand(&info, hkdf::HKDF_SHA256).map_err(|_| CryptoError::InvalidMasterKey)?;
            okm.fill(&mut key).map_err(|_| CryptoError::InvalidMasterKey)?;
            Ok(key)
        };
        let mac = |label| derive(label).map(|key| hmac::Key::new(hmac::HMAC_SHA256, &key));
        Ok(Self {
            requests: SealingKey::new(&derive("request at rest")?)?,
            days: SealingKey::new(&derive("key of an expiry day")?)?,
            content: mac("content digest")?,
            groups: mac("group digest")?,
            tokens: mac("result token")?,
            messages: mac("message digest")?,
            fingerprint: derive("fingerprint")?.to_vec(),
        })
    }

    /// 32 bytes that tell this master key from another one, and nothing about it.
    #[must_use]
    pub fn fingerprint(&self) -> &[u8] {
        &self.fingerprint
    }

    /// Seals requests at rest.
    #[must_use]
    pub const fn requests(&self) -> &SealingKey {
        &self.requests
    }

    /// Seals the keys of the days of expiry.
    #[must_use]
    pub const fn days(&self) -> &SealingKey {
        &self.days
    }

    /// Keyed digest of a parsed request.
    #[must_use]
    pub fn content_digest(&self, content: &[u8]) -> Vec<u8> {
        hmac::sign(&self.content, content).as_ref().to_vec()
    }

    /// Keyed digest of a group id of a controller.
    #[must_use]
    pub fn group_digest(&self, controller_id: &str, group_id: &str) -> Vec<u8> {
        hmac::sign(&self.groups, format!("{controller_id}\0{group_id}").as_bytes()).as_ref().to_vec()
    }

    /// Keyed digest of a message, for the count of its failures.
    #[must_use]
    pub fn message_digest(&self, queue: &str, routing_key: &str, body: &[u8]) -> Vec<u8> {
        let mut context = hmac::Context::with_key(&self.messages);
        for part in [queue.as_bytes(), b"\0", routing_key.as_bytes(), b"\0", body] {
            context.update(part);
        }
        context.sign().as_ref().to_vec()
    }

    /// The bytes of a result token (contract 7): over the result's id and its salt.
    #[must_use]
    pub(crate) fn result_token(&self, result_id: &[u8], salt: &[u8]) -> Vec<u8> {
        hmac::sign(&self.tokens, &[result_id, salt].concat()).as_ref().to_vec()
    }
}

/// In front of each sealed text: the number of the master key under which it was sealed. There is one so far; with the
/// number in place a second one can be introduced without opening what the first has sealed.
const KEY_NUMBER: u8 = 1;

/// AES-256-GCM. A sealed text is the number of the key, a random nonce, and what was encrypted.
pub struct SealingKey(LessSafeKey);

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKey(…)")
    }
}

impl SealingKey {
    /// A key from its bytes.
    ///
    /// # Errors
    /// [`CryptoError::Unopenable`] if `key` is not 32 bytes long.
    pub fn new(key: &[u8]) -> Result<Self, CryptoError> {
        UnboundKey::new(&AES_256_GCM, key).map(|key| Self(LessSafeKey::new(key))).map_err(|_| CryptoError::Unopenable)
    }

    /// Seals `plain`, bound to `context`: it opens only with the same context.
    ///
    /// # Errors
    /// [`CryptoError::Random`].
    pub fn seal(&self, context: &[u8], plain: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let nonce = random::<NONCE_LEN>()?;
        let mut sealed = Vec::with_capacity(1 + NONCE_LEN + plain.len() + AES_256_GCM.tag_len());
        sealed.extend_from_slice(plain);
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut sealed)
            .map_err(|_| CryptoError::Random)?;
        sealed.splice(0..0, [KEY_NUMBER].into_iter().chain(nonce));
        Ok(sealed)
    }

    /// Opens what [`Self::seal`] sealed in the same context.
    ///
    /// # Errors
    /// [`CryptoError::Unopenable`].
    pub fn open(&self, context: &[u8], sealed: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let numbered = sealed.strip_prefix(&[KEY_NUMBER]).ok_or(CryptoError::Unopenable);
        // What was sealed before there were numbers begins with its nonce.
        numbered.and_then(|rest| self.open_from_nonce(context, rest)).or_else(|_| self.open_from_nonce(context, sealed))
    }

    fn open_from_nonce(&self, context: &[u8], sealed: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let (nonce, rest) = sealed.split_at_checked(NONCE_LEN).ok_or(CryptoError::Unopenable)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| CryptoError::Unopenable)?;
        let mut buffer = rest.to_vec();
        let plain =
            self.0.open_in_place(nonce, Aad::from(context), &mut buffer).map_err(|_| CryptoError::Unopenable)?.len();
        buffer.truncate(plain);
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(fill: u8) -> Keys {
        Keys::from_master_key(&STANDARD.encode([fill; 32])).unwrap()
    }

    #[test]
    fn sealed_text_opens_only_as_it_was_sealed() {
        let sealed = keys(1).requests().seal(b"acme/1", b"ada@example.com").unwrap();
        assert_eq!(keys(1).requests().open(b"acme/1", &sealed).unwrap(), b"ada@example.com");
        assert!(keys(1).requests().open(b"acme/2", &sealed).is_err());
        assert!(keys(2).requests().open(b"acme/1", &sealed).is_err());
        assert!(keys(1).days().open(b"acme/1", &sealed).is_err());
        for position in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 1;
            assert!(keys(1).requests().open(b"acme/1", &changed).is_err());
        }
        assert!(keys(1).requests().open(b"", b"short").is_err());
        // As it was written before keys had numbers.
        assert_eq!(keys(1).requests().open(b"acme/1", &sealed[1..]).unwrap(), b"ada@example.com");
    }

    #[test]
    fn digests_differ_by_key_and_by_use() {
        assert_ne!(keys(1).content_digest(b"x"), keys(2).content_digest(b"x"));
        assert_ne!(keys(1).content_digest(b"x"), keys(1).result_token(b"x", b""));
        assert_eq!(keys(1).group_digest("a", "b"), keys(1).group_digest("a", "b"));
        assert_ne!(keys(1).group_digest("a", "bc"), keys(1).group_digest("ab", "c"));
    }

    #[test]
    fn a_master_key_has_32_bytes() {
        for text in ["", "abc", &STANDARD.encode([0; 31]), &STANDARD.encode([0; 33])] {
            assert_eq!(Keys::from_master_key(text).unwrap_err(), CryptoError::InvalidMasterKey);
        }
        assert!(Keys::from_master_key(&format!("{}\n", STANDARD.encode([0; 32]))).is_ok());
    }
}
