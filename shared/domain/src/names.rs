//! Enumerations that are written as text: on the wire, in the database, in metrics.

/// The text does not name any such thing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown {kind}")]
pub struct UnknownName {
    kind: &'static str,
}

impl UnknownName {
    pub(crate) const fn new(kind: &'static str) -> Self {
        Self { kind }
    }
}

/// Gives each variant its name: `ALL`, `as_str`, `FromStr`, `Display`, and the text columns of PostgreSQL.
macro_rules! names {
    ($type:ident, $kind:literal, $($variant:ident = $name:literal),+) => {
        impl $type {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name on the wire and in the database.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::names::UnknownName;
            fn from_str(text: &str) -> Result<Self, $crate::names::UnknownName> {
                match text { $($name => Ok(Self::$variant),)+ _ => Err($crate::names::UnknownName::new($kind)) }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        $crate::names::stored_as_text!($type);
    };
}
pub(crate) use names;

/// Text columns of PostgreSQL, for a type with `as_str` and `FromStr`. A text that names nothing is an error of the column,
/// and never a panic: read it with `column`.
macro_rules! stored_as_text {
    ($type:ident) => {
        impl<'a> postgres_types::FromSql<'a> for $type {
            fn from_sql(
                kind: &postgres_types::Type,
                raw: &'a [u8],
            ) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
                Ok(<&str>::from_sql(kind, raw)?.parse()?)
            }

            fn accepts(kind: &postgres_types::Type) -> bool {
                <&str as postgres_types::FromSql>::accepts(kind)
            }
        }

        impl postgres_types::ToSql for $type {
            fn to_sql(
                &self,
                kind: &postgres_types::Type,
                out: &mut postgres_types::private::BytesMut,
            ) -> Result<postgres_types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
                self.as_str().to_sql(kind, out)
            }

            fn accepts(kind: &postgres_types::Type) -> bool {
                <&str as postgres_types::ToSql>::accepts(kind)
            }

            postgres_types::to_sql_checked!();
        }
    };
}
pub(crate) use stored_as_text;
