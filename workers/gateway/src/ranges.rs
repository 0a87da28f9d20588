//! Byte ranges (RFC 9110, section 14).

use std::ops::RangeInclusive;

use axum::http::HeaderMap;
use axum::http::header::{IF_RANGE, RANGE};
use http_range_header::{StartPosition, SyntacticallyCorrectRange};

/// What of a file is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All of it.
    Whole,
    /// These bytes, both ends included.
    Part(RangeInclusive<u64>),
    /// Bytes that it does not have.
    Unsatisfiable,
}

/// What of a file of `size` bytes and with this tag is asked for. Several ranges at once are answered with the whole
/// file, as is a range of a file with another tag, or in another unit.
pub(crate) fn wanted(headers: &HeaderMap, size: u64, etag: &str) -> Wanted {
    let Some(range) = headers.get(RANGE).and_then(|value| value.to_str().ok()) else { return Wanted::Whole };
    let same_file = headers.get(IF_RANGE).is_none_or(|value| value.as_bytes() == etag.as_bytes());
    if !same_file || !range.trim_start().starts_with("bytes") {
        return Wanted::Whole;
    }
    let parsed = http_range_header::parse_range_header(range);
    if let Ok([SyntacticallyCorrectRange { start: StartPosition::FromLast(length), .. }]) =
        parsed.as_ref().map(|parsed| parsed.ranges.as_slice())
        && *length >= size
        && size > 0
    {
        // The last bytes of a file that has fewer are all of it.
        return Wanted::Part(0..=size - 1);
    }
    match parsed.and_then(|parsed| parsed.validate(size)).as_deref() {
        Ok([one]) => Wanted::Part(one.clone()),
        Ok(_) => Wanted::Whole,
        Err(_) => Wanted::Unsatisfiable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(range: &str, if_range: Option<&str>) -> Wanted {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, range.parse().unwrap());
        if let Some(tag) = if_range {
            headers.insert(IF_RANGE, tag.parse().unwrap());
        }
        wanted(&headers, 100, "\"a\"")
    }

    #[test]
    fn ranges_as_clients_send_them() {
        assert_eq!(wanted(&HeaderMap::new(), 100, "\"a\""), Wanted::Whole);
        assert_eq!(of("bytes=0-0", None), Wanted::Part(0..=0));
        assert_eq!(of("bytes=10-", None), Wanted::Part(10..=99));
        assert_eq!(of("bytes=-10", None), Wanted::Part(90..=99));
        assert_eq!(of("bytes=-100", None), Wanted::Part(0..=99));
        assert_eq!(of("bytes=-101", None), Wanted::Part(0..=99));
        assert_eq!(of("bytes=-0", None), Wanted::Unsatisfiable);
        assert_eq!(of("bytes=90-1000", None), Wanted::Part(90..=99));
        assert_eq!(of("bytes=0-1,5-6", None), Wanted::Whole);
        assert_eq!(of("pages=1-2", None), Wanted::Whole);
        assert_eq!(of("bytes=100-", None), Wanted::Unsatisfiable);
        assert_eq!(of("bytes=5-4", None), Wanted::Unsatisfiable);
        assert_eq!(of("bytes=10-", Some("\"a\"")), Wanted::Part(10..=99));
        assert_eq!(of("bytes=10-", Some("\"b\"")), Wanted::Whole);
    }
}
