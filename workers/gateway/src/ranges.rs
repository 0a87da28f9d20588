//! Byte ranges (RFC 9110, section 14).

use std::ops::RangeInclusive;

use axum::http::HeaderMap;
use axum::http::header::{IF_RANGE, RANGE};

/// Which part of a file is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All of it.
    Whole,
    /// These bytes, both ends included.
    Part(RangeInclusive<u64>),
    /// Bytes that it does not have.
    Unsatisfiable,
}

/// Which part of a file of `size` bytes and with this tag is asked for. A header that cannot be read is ignored, as the
/// RFC says; so are a range of a file with another tag, or in another unit. Several ranges at once are answered with
/// the whole file, unless it has none of them.
pub(crate) fn wanted(headers: &HeaderMap, size: u64, etag: &str) -> Wanted {
    let Some(range) = headers.get(RANGE).and_then(|value| value.to_str().ok()) else { return Wanted::Whole };
    let same_file = headers.get(IF_RANGE).is_none_or(|value| value.as_bytes() == etag.as_bytes());
    let Some(ranges) = parse(range).filter(|_| same_file) else { return Wanted::Whole };
    let present: Vec<_> = ranges.iter().filter_map(|range| range.within(size)).collect();
    match present.as_slice() {
        [] => Wanted::Unsatisfiable,
        [one] if ranges.len() == 1 => Wanted::Part(one.clone()),
        _ => Wanted::Whole,
    }
}

/// One `range-spec` of section 14.1.1.
enum Range {
    From(u64, u64),
    Last(u64),
}

impl Range {
    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.split_once('-')?;
        let number = |text: &str| {
            // A number too large for the type names a byte that no file has.
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse().unwrap_or(u64::MAX))
        };
        match (first, last) {
            ("", length) => Some(Self::Last(number(length)?)),
            (first, "") => Some(Self::From(number(first)?, u64::MAX)),
            (first, last) => Some(Self::From(number(first)?, number(last)?)).filter(Self::is_valid),
        }
    }

    const fn is_valid(&self) -> bool {
        match self {
            Self::From(first, last) => *first <= *last,
            Self::Last(_) => true,
        }
    }

    /// The part of it that a file of `size` bytes has.
    fn within(&self, size: u64) -> Option<RangeInclusive<u64>> {
        let end = size.checked_sub(1)?;
        match *self {
            Self::From(first, last) => (first <= end).then(|| first..=last.min(end)),
            Self::Last(length) => (length > 0).then(|| size.saturating_sub(length)..=end),
        }
    }
}

/// The ranges of the header; `None` where it cannot be read, or is in another unit than bytes.
fn parse(header: &str) -> Option<Vec<Range>> {
    let (unit, set) = header.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let specs = set.split(',').map(|spec| spec.trim_matches([' ', '\t'])).filter(|spec| !spec.is_empty());
    let ranges: Vec<Range> = specs.map(Range::parse).collect::<Option<_>>()?;
    (!ranges.is_empty()).then_some(ranges)
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
    fn one_range_is_answered_with_it() {
        assert_eq!(of("bytes=0-0", None), Wanted::Part(0..=0));
        assert_eq!(of("bytes=10-", None), Wanted::Part(10..=99));
        assert_eq!(of("bytes=-10", None), Wanted::Part(90..=99));
        assert_eq!(of("bytes=-100", None), Wanted::Part(0..=99));
        assert_eq!(of("bytes=-101", None), Wanted::Part(0..=99));
        assert_eq!(of("bytes=90-1000", None), Wanted::Part(90..=99));
        assert_eq!(of("Bytes=00-0009", None), Wanted::Part(0..=9));
        assert_eq!(of("bytes=90-99999999999999999999", None), Wanted::Part(90..=99));
        assert_eq!(of("bytes=10-", Some("\"a\"")), Wanted::Part(10..=99));
    }

    #[test]
    fn what_cannot_be_read_is_ignored() {
        assert_eq!(wanted(&HeaderMap::new(), 100, "\"a\""), Wanted::Whole);
        for range in [
            "bytes=5-4",
            "bytes=",
            "bytes=,",
            "bytes=a-b",
            "bytes=0-1,x",
            "bytes=-",
            "bytes=+1-2",
            "bytes",
            "pages=1-2",
            "bytes=--1",
        ] {
            assert_eq!(of(range, None), Wanted::Whole, "{range}");
        }
        assert_eq!(of("bytes=10-", Some("\"b\"")), Wanted::Whole);
    }

    #[test]
    fn several_are_answered_with_the_whole_file() {
        for range in ["bytes=0-1,5-6", "bytes=0-10, 5-20", "bytes=200-,0-1", "bytes=0-0,,1-1"] {
            assert_eq!(of(range, None), Wanted::Whole, "{range}");
        }
    }

    #[test]
    fn only_where_nothing_overlaps_is_it_unsatisfiable() {
        for range in ["bytes=100-", "bytes=-0", "bytes=100-200,300-", "bytes=99999999999999999999-"] {
            assert_eq!(of(range, None), Wanted::Unsatisfiable, "{range}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, "bytes=0-".parse().unwrap());
        assert_eq!(wanted(&headers, 0, "\"a\""), Wanted::Unsatisfiable);
    }
}
