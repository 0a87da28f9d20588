//! Screening what the broker sends, before the client library reads it (docs/adr/0026-messages-are-screened.md).
//!
//! A publisher chooses the properties and headers of a message. The library gives up the whole connection for a text
//! that is not UTF-8 or a type that it does not know, and its reader of nested tables recurses without a limit. Here
//! such a message loses its properties, all but one header that says why; its consumer then lets the broker keep it in
//! `<queue>.dead`, unchanged. Its neighbours notice nothing.

use std::collections::BTreeSet;
use std::io;

use lapin::message::Delivery;

/// The header of a message whose properties could not be read; its text says why.
pub(super) const UNREADABLE: &str = "x-lethe-unreadable";
/// Tables and arrays inside one another, at most. What RabbitMQ adds itself is nested four deep.
const MAX_DEPTH: u32 = 16;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const FRAME_END: u8 = 0xCE;
/// Type, channel and size.
const PREFIX: usize = 7;
/// The prefix of a content header, its class, its weight and the size of the body.
const HEADER_START: usize = PREFIX + 2 + 2 + 8;
/// Class `connection`.
const CONNECTION: u16 = 10;
const TUNE: u16 = 30;
/// Class `basic` (AMQP 0-9-1, 1.8).
const BASIC: u16 = 60;
const DELIVER: u16 = 60;
const GET_OK: u16 = 71;
/// The one flag of a content header whose only property is its headers (AMQP 0-9-1, 4.2.6.1).
const HEADERS_ONLY: u16 = 1 << 13;

/// Whether a message has lost its properties here.
pub(super) fn is_unreadable(delivery: &Delivery) -> bool {
    delivery.properties.headers().as_ref().is_some_and(|table| table.contains_key(UNREADABLE))
}

/// Goes along with a connection, from the broker's first byte on.
#[derive(Debug)]
pub(super) struct Screen {
    /// The frame that is being gathered: all of it if it is inspected, otherwise its prefix only.
    held: Vec<u8>,
    /// What is left of a frame that is not looked at.
    passing: usize,
    /// What is left of a content header that is too large, which nobody reads.
    dropping: usize,
    /// Bytes of a frame at most, as it was agreed; more ends the connection in the library.
    frame_max: usize,
    /// Channels whose next content header belongs to a message with an unreadable name.
    tainted: BTreeSet<u16>,
}

impl Screen {
    /// For a connection whose frames hold at most `frame_max` bytes.
    pub(super) const fn new(frame_max: u32) -> Self {
        Self { held: Vec::new(), passing: 0, dropping: 0, frame_max: frame_max as usize, tainted: BTreeSet::new() }
    }

    /// Takes what the broker has sent, and appends to `out` what the library may read of it.
    ///
    /// # Errors
    /// A frame is larger than was agreed, or is none.
    pub(super) fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.passing > 0 {
                let (now, later) = bytes.split_at(self.passing.min(bytes.len()));
                out.extend_from_slice(now);
                self.passing -= now.len();
                bytes = later;
                continue;
            }
            if self.dropping > 0 {
                let (now, later) = bytes.split_at(self.dropping.min(bytes.len()));
                self.dropping -= now.len();
                bytes = later;
                continue;
            }
            let (now, later) = bytes.split_at((self.wanted() - self.held.len()).min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = later;
            if !matches!(self.held.first(), None | Some(&(METHOD | HEADER | BODY | HEARTBEAT))) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the server does not speak AMQP 0-9-1"));
            }
            let Some(len) = self.frame_len() else { continue };
            let is_header = self.held[0] == HEADER;
            if !is_header && self.held[0] != METHOD {
                self.passing = len - self.held.len();
                out.append(&mut self.held);
            } else if self.held.len() == len {
                self.judge();
                out.append(&mut self.held);
            } else if len > self.frame_max && !is_header {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is larger than agreed"));
            } else if len > self.frame_max && self.held.len() == HEADER_START {
                self.dropping = len - HEADER_START;
                self.judge();
                out.append(&mut self.held);
            }
        }
        Ok(())
    }

    /// How many bytes have to be held before something is done about them.
    fn wanted(&self) -> usize {
        match self.frame_len() {
            None => PREFIX,
            // Brokers allow a little more than was agreed, and add headers of their own.
            Some(len) if len > self.frame_max && self.held[0] == HEADER => HEADER_START,
            Some(len) => len,
        }
    }

    /// The length of the frame whose prefix is held.
    fn frame_len(&self) -> Option<usize> {
        let size = u32::from_be_bytes(self.held.get(3..PREFIX)?.try_into().ok()?);
        Some(PREFIX + size as usize + 1)
    }

    /// Rewrites the held frame where the library could not read it.
    fn judge(&mut self) {
        let channel = u16::from_be_bytes([self.held[1], self.held[2]]);
        if self.held[0] == METHOD {
            let end = self.held.len() - 1;
            self.heed_tune();
            if mend_names(&mut self.held[PREFIX..end]) {
                self.tainted.insert(channel);
            }
            return;
        }
        let mut content = Reader(&self.held[PREFIX..]);
        let Ok(size) = content.fixed_header() else { return };
        let is_tainted = self.tainted.remove(&channel);
        let verdict = match content.0.split_last() {
            None => Err(Unreadable::Size),
            Some(_) if is_tainted => Err(Unreadable::Text),
            Some((_, properties)) => Reader(properties).properties(),
        };
        if let Err(why) = verdict {
            self.held = without_properties(channel, size, why.as_str());
        }
    }

    /// The broker may agree to smaller frames only: `connection.tune`, in which 0 means unlimited (AMQP 0-9-1, 1.4.2.6).
    fn heed_tune(&mut self) {
        let mut tune = Reader(&self.held[PREFIX..]);
        if (tune.u16(), tune.u16()) == (Ok(CONNECTION), Ok(TUNE))
            && tune.u16().is_ok()
            && let Ok(offered) = tune.fixed().map(u32::from_be_bytes)
            && offered > 0
        {
            self.frame_max = self.frame_max.min(offered as usize);
        }
    }
}

/// Exchange and routing key are the publisher's. Makes them readable where they are not; whether it had to.
fn mend_names(payload: &mut [u8]) -> bool {
    let mut reader = Reader(payload);
    let names = (|| {
        let (class, method) = (reader.u16()?, reader.u16()?);
        match (class, method) {
            (BASIC, DELIVER) => {
                reader.short()?;
                reader.take(8 + 1)?;
            }
            (BASIC, GET_OK) => {
                reader.take(8 + 1)?;
            }
            _ => return Err(Unreadable::Length),
        }
        let begin = reader.0.len();
        reader.short_bytes()?;
        reader.short_bytes()?;
        Ok(begin)
    })();
    let Ok(left) = names else { return false };
    let at = payload.len() - left;
    let Some(names) = payload.get_mut(at..) else { return false };
    let (mut mended, mut place) = (false, 0);
    for _ in 0..2 {
        let Some(&length) = names.get(place) else { break };
        let end = place + 1 + usize::from(length);
        let Some(name) = names.get_mut(place + 1..end) else { break };
        if std::str::from_utf8(name).is_err() {
            name.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = b'?');
            mended = true;
        }
        place = end;
    }
    mended
}

/// A content header frame for a body of `size` bytes that says only why its properties are missing.
fn without_properties(channel: u16, size: u64, why: &str) -> Vec<u8> {
    let mut table = vec![u8::try_from(UNREADABLE.len()).unwrap_or(0)];
    table.extend_from_slice(UNREADABLE.as_bytes());
    table.push(b'S');
    table.extend_from_slice(&length(why.as_bytes()));
    table.extend_from_slice(why.as_bytes());
    let mut payload = Vec::new();
    payload.extend_from_slice(&BASIC.to_be_bytes());
    payload.extend_from_slice(&0_u16.to_be_bytes());
    payload.extend_from_slice(&size.to_be_bytes());
    payload.extend_from_slice(&HEADERS_ONLY.to_be_bytes());
    payload.extend_from_slice(&length(&table));
    payload.extend_from_slice(&table);
    let mut frame = vec![HEADER];
    frame.extend_from_slice(&channel.to_be_bytes());
    frame.extend_from_slice(&length(&payload));
    frame.extend_from_slice(&payload);
    frame.push(FRAME_END);
    frame
}

fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Why properties cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreadable {
    Text,
    Type,
    Length,
    Depth,
    Size,
    Reserved,
}

impl Unreadable {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "a property, a header's name or the routing key is not valid UTF-8",
            Self::Type => "a header has a type that AMQP 0-9-1 does not know",
            Self::Length => "a property is longer or shorter than it says",
            Self::Depth => "the headers are nested too deeply",
            Self::Size => "the properties are larger than a frame",
            Self::Reserved => "a header has a name that is reserved",
        }
    }
}

/// Reads as the library does (AMQP 0-9-1, 4.2.5), except that it keeps nothing and goes only so deep.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Unreadable> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Unreadable::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        self.take(N)?.try_into().map_err(|_| Unreadable::Length)
    }

    fn u16(&mut self) -> Result<u16, Unreadable> {
        Ok(u16::from_be_bytes(self.fixed()?))
    }

    fn short_bytes(&mut self) -> Result<&'a [u8], Unreadable> {
        let [length] = self.fixed()?;
        self.take(length.into())
    }

    fn short(&mut self) -> Result<&'a str, Unreadable> {
        std::str::from_utf8(self.short_bytes()?).map_err(|_| Unreadable::Text)
    }

    fn long(&mut self) -> Result<&'a [u8], Unreadable> {
        let length = u32::from_be_bytes(self.fixed()?);
        self.take(length as usize)
    }

    /// Class, weight and the size of the body, which is returned.
    fn fixed_header(&mut self) -> Result<u64, Unreadable> {
        self.take(4)?;
        Ok(u64::from_be_bytes(self.fixed()?))
    }

    /// The properties of class `basic`, in the order of their flags, to the last byte.
    fn properties(&mut self) -> Result<(), Unreadable> {
        let flags = self.u16()?;
        for bit in (2..16).rev().filter(|bit| flags & (1 << bit) != 0) {
            match bit {
                13 => {
                    let table = self.long()?;
                    Reader(table).table(1)?;
                }
                12 | 11 => drop(self.take(1)?),
                6 => drop(self.take(8)?),
                _ => drop(self.short()?),
            }
        }
        if self.0.is_empty() { Ok(()) } else { Err(Unreadable::Length) }
    }

    fn table(&mut self, depth: u32) -> Result<(), Unreadable> {
        while !self.0.is_empty() {
            // Only we write it, and not to the broker.
            if self.short()? == UNREADABLE && depth == 1 {
                return Err(Unreadable::Reserved);
            }
            self.value(depth)?;
        }
        Ok(())
    }

    fn value(&mut self, depth: u32) -> Result<(), Unreadable> {
        let [kind] = self.fixed()?;
        let size = match kind {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' => return self.long().map(drop),
            b'A' | b'F' => {
                let mut inside = Reader(self.long()?);
                if depth >= MAX_DEPTH {
                    return Err(Unreadable::Depth);
                }
                if kind == b'F' {
                    return inside.table(depth + 1);
                }
                while !inside.0.is_empty() {
                    inside.value(depth + 1)?;
                }
                return Ok(());
            }
            _ => return Err(Unreadable::Type),
        };
        self.take(size).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPFrame, parse_frame};
    use lapin::types::AMQPValue;
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 0, 7][..], &length(payload), payload, &[FRAME_END]].concat()
    }

    fn content_header(flags: u16, properties: &[u8]) -> Vec<u8> {
        let start = [&BASIC.to_be_bytes()[..], &[0, 0], &42_u64.to_be_bytes(), &flags.to_be_bytes()].concat();
        frame(HEADER, &[&start[..], properties].concat())
    }

    fn table(entries: &[u8]) -> Vec<u8> {
        [&length(entries)[..], entries].concat()
    }

    /// `{"a": {"a": …}}`
    fn nested(depth: usize) -> Vec<u8> {
        (1..depth).fold(Vec::new(), |inner, _| [&[1, b'a', b'F'][..], &table(&inner)].concat())
    }

    fn screened(bytes: &[u8], step: usize) -> Vec<u8> {
        let mut screen = Screen::new(128 * 1024);
        let mut out = Vec::new();
        bytes.chunks(step).for_each(|chunk| screen.feed(chunk, &mut out).unwrap());
        out
    }

    fn reason(bytes: &[u8]) -> Option<String> {
        let (rest, read) = parse_frame(bytes).unwrap();
        assert!(rest.is_empty());
        let AMQPFrame::Header(7, header) = read else { panic!("another frame") };
        assert_eq!(header.body_size, 42);
        match header.properties.headers().as_ref()?.inner().get(UNREADABLE)? {
            AMQPValue::LongString(text) => Some(text.to_string()),
            _ => None,
        }
    }

    #[test]
    fn what_can_be_read_passes_unchanged() {
        let user = [&[4][..], b"acme"].concat();
        let headers = table(&[&[1, b'n', b'l'][..], &[0; 8], &[1, b'd', b'A'], &table(&[b'V', b't', 1])].concat());
        let frames = [
            content_header(1 << 4, &user),
            content_header(HEADERS_ONLY, &headers),
            content_header(HEADERS_ONLY, &table(&nested(MAX_DEPTH as usize))),
            frame(3, &[0xFF; 500]),
            frame(8, b""),
        ]
        .concat();
        for step in [1, 3, 64, frames.len()] {
            assert_eq!(screened(&frames, step), frames);
        }
    }

    #[test]
    fn what_cannot_be_read_loses_its_properties_and_says_why() {
        for (frame, why) in [
            (content_header(1 << 7, &[1, 0xFF]), Unreadable::Text),
            (content_header(HEADERS_ONLY, &table(&[1, 0xFF, b'V'])), Unreadable::Text),
            (content_header(HEADERS_ONLY, &table(&[1, b'a', b'?'])), Unreadable::Type),
            (content_header(HEADERS_ONLY, &table(&[9, b'a'])), Unreadable::Length),
            (content_header(HEADERS_ONLY, &table(&nested(MAX_DEPTH as usize + 1))), Unreadable::Depth),
            (content_header(HEADERS_ONLY, &table(&nested(18_000))), Unreadable::Depth),
            (
                content_header(HEADERS_ONLY, &table(&[&[18][..], UNREADABLE.as_bytes(), b"V"].concat())),
                Unreadable::Reserved,
            ),
        ] {
            assert_eq!(reason(&screened(&frame, 1_000)).as_deref(), Some(why.as_str()));
        }
    }

    #[test]
    fn a_routing_key_that_is_not_utf_8_marks_its_own_message_only() {
        let deliver = |key: &[u8]| {
            let begin = [&BASIC.to_be_bytes()[..], &DELIVER.to_be_bytes(), &[1, b'c'], &[0; 9], &[0]].concat();
            frame(METHOD, &[&begin[..], &[u8::try_from(key.len()).unwrap()], key].concat())
        };
        let plain = content_header(0, b"");
        let out =
            screened(&[deliver(b"\xFF.request"), plain.clone(), deliver(b"a.request"), plain.clone()].concat(), 5);
        let (rest, first) = parse_frame(&out[..]).unwrap();
        assert!(format!("{first:?}").contains("?.request"), "{first:?}");
        let (rest, marked) = parse_frame(rest).unwrap();
        assert!(format!("{marked:?}").contains(UNREADABLE), "{marked:?}");
        assert_eq!(rest, [deliver(b"a.request"), plain].concat());
    }

    #[test]
    fn properties_larger_than_a_frame_are_not_read() {
        let fits = 128 * 1024 - PREFIX - 1 - 12 - 2 - 4;
        let filled = |size: usize| {
            content_header(
                HEADERS_ONLY,
                &table(&[&[1, b'a', b'S'][..], &length(&vec![b'x'; size - 7]), &vec![b'x'; size - 7]].concat()),
            )
        };
        let neighbour = content_header(0, b"");
        for step in [1_000, 131_072, usize::MAX >> 1] {
            assert_eq!(screened(&filled(fits), step), filled(fits));
            for size in [fits + 1, fits + 8, 2 * fits] {
                let out = screened(&[filled(size), neighbour.clone()].concat(), step);
                assert_eq!(reason(&out[..out.len() - neighbour.len()]).as_deref(), Some(Unreadable::Size.as_str()));
                assert!(out.ends_with(&neighbour));
            }
        }
    }

    #[test]
    fn frames_are_as_small_as_the_broker_wants_them() {
        let tune =
            [&CONNECTION.to_be_bytes()[..], &TUNE.to_be_bytes(), &[0, 0], &4_096_u32.to_be_bytes(), &[0, 20]].concat();
        let long = content_header(
            HEADERS_ONLY,
            &table(&[&[1, b'a', b'S'][..], &length(&[b'x'; 5_000]), &[b'x'; 5_000]].concat()),
        );
        let out = screened(&[frame(METHOD, &tune), long].concat(), 100);
        let at = frame(METHOD, &tune).len();
        assert_eq!(reason(&out[at..]).as_deref(), Some(Unreadable::Size.as_str()));
    }

    #[test]
    fn what_is_no_frame_ends_the_connection() {
        let mut out = Vec::new();
        assert!(Screen::new(4_096).feed(&[METHOD, 0, 1, 0, 1, 0, 0], &mut out).is_err());
        assert!(Screen::new(4_096).feed(b"HTTP/1.1 400", &mut out).is_err());
    }

    proptest! {
        /// Whatever the bytes: what passes the screen can be read by the library.
        #[test]
        fn the_library_reads_whatever_passes(flags: u16, noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse_frame(&screened(&content_header(flags, &noise), 50)[..]).is_ok());
        }

        /// The same, close to what is valid: one byte of a good frame is another one.
        #[test]
        fn the_library_reads_whatever_passes_of_mutations(at in 0_usize..80, value: u8) {
            let headers = table(&[&[3, b'a', b'b', b'c', b'F'][..], &table(&[1, b'x', b'S', 0, 0, 0, 1, b'y']),
                &[1, b'l', b'A'], &table(&[b'D', 1, 0, 0, 0, 1, b'd', 0, 0, 0, 0, 0, 0, 0, 0])].concat());
            let good = content_header(HEADERS_ONLY | 1 << 15 | 1 << 4, &[&[2, b'o', b'k'][..], &headers, &[1, b'u']].concat());
            let mut bad = good;
            let at = PREFIX + 12 + at % (bad.len() - PREFIX - 13);
            bad[at] = value;
            prop_assert!(parse_frame(&screened(&bad, 50)[..]).is_ok());
        }
    }
}
