//! What the doctor finds.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Good,
    Look,
    Bad,
}

#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) subject: &'static str,
    pub(super) verdict: Verdict,
    pub(super) what: String,
    /// What to do; empty if nothing is to be done.
    pub(super) advice: String,
}

#[derive(Default)]
pub(super) struct Findings(Vec<Finding>);

impl Findings {
    pub(super) fn as_slice(&self) -> &[Finding] {
        &self.0
    }

    pub(super) fn add(&mut self, subject: &'static str, verdict: Verdict, what: impl std::fmt::Display, advice: &str) {
        self.0.push(Finding { subject, verdict, what: what.to_string(), advice: advice.to_owned() });
    }

    pub(super) fn check<T, E: std::fmt::Display>(
        &mut self,
        subject: &'static str,
        outcome: Result<T, E>,
        good: &str,
        advice: &str,
    ) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.add(subject, Verdict::Good, good, "");
                Some(value)
            }
            Err(error) => {
                self.add(subject, Verdict::Bad, format!("{error:#}"), advice);
                None
            }
        }
    }
}
