//! Why a line cannot be taken: by field and rule, never by value.

use std::borrow::Cow;
use std::fmt;

use lethe_domain::opendsr::IdentityType;

/// Levels of nesting at most. PostgreSQL's own limit depends on its stack.
pub(super) const MAX_DEPTH: usize = 1_000;

/// A line that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidLine {
    /// The field, as a path such as `identities.email`; empty for the line as a whole.
    pub field: Cow<'static, str>,
    /// What is wrong with it.
    pub rule: Rule,
    /// Where, in bytes from 1, if one place is wrong.
    pub column: Option<usize>,
}

/// A rule that a line breaks. Its text completes a sentence that begins with the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each says what it is")]
pub enum Rule {
    #[error("is not UTF-8")]
    NotUtf8,
    #[error("is not well-formed JSON")]
    Malformed,
    #[error("is a JSON array; each line holds one JSON object (`jq -c '.[]'` makes such a file)")]
    Array,
    #[error("is not a JSON object")]
    NotObject,
    #[error("has a carriage return inside; lines end with LF or CRLF")]
    CarriageReturn,
    #[error("is longer than 64 MiB; each line holds one JSON object")]
    TooLong,
    #[error("must be a 64-bit signed integer, as a number or a string")]
    Mpid,
    #[error("is required: a 64-bit signed integer")]
    MissingMpid,
    #[error("has the same key twice in one object")]
    DuplicateKey,
    #[error("must be an object that maps identity types to values")]
    Identities,
    #[error("holds an unknown identity type; the known ones are {}", IdentityType::names(false))]
    IdentityType,
    #[error("must be a string, an integer, or a list of these")]
    IdentityValue,
    #[error("holds the character U+0000, which PostgreSQL cannot store")]
    Nul,
    #[error("holds half of a surrogate pair, which PostgreSQL cannot store")]
    LoneSurrogate,
    #[error("holds a number that is out of range for PostgreSQL")]
    NumberRange,
    #[error("is nested deeper than {} levels", MAX_DEPTH)]
    TooDeep,
    #[error("is refused by PostgreSQL: {}", refusal(sqlstate))]
    Refused {
        /// The SQLSTATE.
        sqlstate: String,
    },
}

/// What a refusal means. The server's own words quote values.
fn refusal(sqlstate: &str) -> String {
    let meaning = match sqlstate {
        "22003" => "a number is out of range",
        "22021" | "22P05" => "a character that it cannot store",
        "22P02" | "22032" => "not JSON that it accepts",
        "23502" | "23514" => "a check of the table fails",
        "54000" | "54001" => "nested too deeply, or too large",
        _ => return format!("SQLSTATE {sqlstate}"),
    };
    format!("{meaning} (SQLSTATE {sqlstate})")
}

impl InvalidLine {
    /// The line as a whole breaks a rule.
    #[must_use]
    pub const fn line(rule: Rule) -> Self {
        Self { field: Cow::Borrowed(""), rule, column: None }
    }

    /// The same, at a place: `index` is that of a byte.
    pub(super) const fn at(rule: Rule, index: usize) -> Self {
        Self { field: Cow::Borrowed(""), rule, column: Some(index + 1) }
    }

    /// A field breaks a rule.
    pub(super) fn field(field: impl Into<Cow<'static, str>>, rule: Rule) -> Self {
        Self { field: field.into(), rule, column: None }
    }
}

impl fmt::Display for InvalidLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = if self.field.is_empty() { "the line" } else { &self.field };
        write!(f, "{subject} {}", self.rule)?;
        match self.column {
            Some(column) => write!(f, " (column {column})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for InvalidLine {}
