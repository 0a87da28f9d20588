//! What PostgreSQL cannot store, found before it is asked: the server refuses a whole group, and names no line.
//!
//! All of it works on texts that are well-formed JSON, and without recursion.

use std::borrow::Cow;
use std::collections::HashSet;

use super::rule::{MAX_DEPTH, Rule};
use lethe_domain::opendsr::json::unit;

/// Digits of a number before and after the point that `numeric` holds.
const DIGITS_BEFORE: i64 = 131_072;
const DIGITS_AFTER: i64 = 16_383;

/// A rule that is broken, and the index of the byte where.
type Broken = (Rule, usize);

/// What the scanner stands in.
enum Container<'a> {
    List,
    Object { keys: HashSet<Cow<'a, str>>, awaits_key: bool },
}

/// Whether `text` can be stored as jsonb without loss: no U+0000, no half of a surrogate pair, no number out of range, no
/// key twice in one object, and not too deep.
pub(super) fn as_jsonb(text: &str) -> Result<(), Broken> {
    let mut open: Vec<Container<'_>> = Vec::new();
    let mut at = 0;
    while let Some(byte) = text.as_bytes().get(at) {
        match byte {
            b'"' => {
                let end = string(text, at)?;
                if let Some(Container::Object { keys, awaits_key }) = open.last_mut()
                    && std::mem::take(awaits_key)
                    && !keys.insert(key(&text[at..end]))
                {
                    return Err((Rule::DuplicateKey, at));
                }
                at = end;
                continue;
            }
            b'{' => open.push(Container::Object { keys: HashSet::new(), awaits_key: true }),
            b'[' => open.push(Container::List),
            b'}' | b']' => drop(open.pop()),
            b',' => {
                if let Some(Container::Object { awaits_key, .. }) = open.last_mut() {
                    *awaits_key = true;
                }
            }
            b'-' | b'0'..=b'9' => {
                at = number(text, at)?;
                continue;
            }
            _ => {}
        }
        if open.len() > MAX_DEPTH {
            return Err((Rule::TooDeep, at));
        }
        at += 1;
    }
    Ok(())
}

/// Whether `text` can be stored as json, which keeps everything as it is.
pub(super) fn as_json(text: &str) -> Result<(), Broken> {
    let (mut depth, mut in_string, mut is_escaped) = (0_usize, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = in_string,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err((Rule::TooDeep, at));
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// The index behind the string that begins at `start`.
fn string(text: &str, start: usize) -> Result<usize, Broken> {
    let mut at = start + 1;
    while let Some(length) = text[at..].find(['"', '\\']) {
        at += length;
        if text.as_bytes()[at] == b'"' {
            return Ok(at + 1);
        }
        at += match unit(&text[at..]) {
            Some(0) => return Err((Rule::Nul, at)),
            Some(0xd800..=0xdbff) if text[at + 6..].get(..6).and_then(unit).is_some_and(is_low) => 12,
            Some(0xd800..=0xdfff) => return Err((Rule::LoneSurrogate, at)),
            Some(_) => 6,
            None => 2,
        };
    }
    Ok(text.len())
}

fn is_low(unit: u16) -> bool {
    (0xdc00..=0xdfff).contains(&unit)
}

/// A key as it reads: two spellings of one name are one key.
fn key(quoted: &str) -> Cow<'_, str> {
    let spelled = Cow::Borrowed(&quoted[1..quoted.len() - 1]);
    if spelled.contains('\\') { serde_json::from_str(quoted).map_or(spelled, Cow::Owned) } else { spelled }
}

/// The index behind the number that begins at `start`.
fn number(text: &str, start: usize) -> Result<usize, Broken> {
    let is_part = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E');
    let length = text.as_bytes()[start..].iter().take_while(|byte| is_part(byte)).count();
    let literal = &text[start..start + length];
    if fits(literal) { Ok(start + length) } else { Err((Rule::NumberRange, start)) }
}

/// Whether `numeric` holds a number.
fn fits(literal: &str) -> bool {
    let (mantissa, exponent) = literal.split_once(['e', 'E']).unwrap_or((literal, "0"));
    let Ok(exponent) = exponent.parse::<i64>() else { return false };
    let (whole, fraction) = mantissa.trim_start_matches('-').split_once('.').unwrap_or((mantissa, ""));
    let digits = |text: &str| i64::try_from(text.len()).unwrap_or(i64::MAX);
    let significant = whole.trim_start_matches(['-', '0']);
    let before = if significant.is_empty() {
        match fraction.trim_start_matches('0') {
            "" => 0,
            rest => exponent.saturating_sub(digits(fraction) - digits(rest)),
        }
    } else {
        digits(significant).saturating_add(exponent)
    };
    before <= DIGITS_BEFORE && digits(fraction).saturating_sub(exponent) <= DIGITS_AFTER
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(text: &str) -> Option<Rule> {
        as_jsonb(text).err().map(|(rule, _)| rule)
    }

    #[test]
    fn what_jsonb_cannot_hold_is_found_where_it_stands() {
        assert_eq!(as_jsonb(r#"{"a":["x","before\u0000after"]}"#), Err((Rule::Nul, 17)));
        assert_eq!(as_jsonb(r#"{"a":"cut \ud83d"}"#), Err((Rule::LoneSurrogate, 10)));
        assert_eq!(broken(r#"["\udc00"]"#), Some(Rule::LoneSurrogate));
        assert_eq!(broken(r#"["\ud83d\u0041"]"#), Some(Rule::LoneSurrogate));
        assert_eq!(broken(r#"{"a":1,"b":{"a":2,"\u0061":3}}"#), Some(Rule::DuplicateKey));
        assert_eq!(broken(&format!("{}{}", "[".repeat(20_000), "]".repeat(20_000))), Some(Rule::TooDeep));
    }

    #[test]
    fn what_jsonb_holds_is_let_through() {
        let deep = format!("{}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
        for fine in [
            r#"{"a":{"a":["a","a",{"a":1}]},"b":"\ud83d\ude00 \\u0000 \"\u00e9","c":[],"d":{}}"#,
            r#""a,{[:\"""#,
            "[1e400,-1.5E-300,0,0e200000,1e131071]",
            deep.as_str(),
        ] {
            assert_eq!(broken(fine), None, "{fine:.80}");
        }
        for beyond in ["1e200000", "-1e131072", "1e-16384", "10e131071", "0.01e131074", "1e99999999999999999999"] {
            assert_eq!(broken(beyond), Some(Rule::NumberRange), "{beyond}");
        }
    }

    #[test]
    fn json_is_limited_in_depth_alone() {
        assert_eq!(as_json(r#"{"a":"\u0000 \ud83d","a":1e9999999,"b":"[[{\"["}"#), Ok(()));
        assert_eq!(as_json(&"[".repeat(MAX_DEPTH + 1)), Err((Rule::TooDeep, MAX_DEPTH)));
    }
}
