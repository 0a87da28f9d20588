//! Defects of Lethe that a run can plant, to see that they are caught.

/// The defects that can be planted, each with its own sign in the violations: others may follow from it.
pub const DEFECTS: [(&str, &str); 10] = [
    ("ack_before_commit", "was confirmed and is not there"),
    ("publish_lost", "stuck"),
    ("no_lease_check", "is left in the result store"),
    ("no_split", "was dead-lettered, and nothing is wrong with it"),
    ("callbacks_out_of_order", "was accepted"),
    ("deaf_consumers", "stuck"),
    ("writers_ignored", "was there before the erasure began"),
    ("lost_commits_believed", "that is not"),
    (OUT_OF_THE_TRAIL, "and the trail says"),
    (OPEN_WEEKS_DROPPED, "and their details are gone"),
];

/// Planted in the database rather than in a process: the trail leaves some completions out.
pub const OUT_OF_THE_TRAIL: &str = "out_of_the_trail";

/// Planted in the scheduler, and in the database, which would refuse it otherwise: a week goes with requests that have not ended.
pub const OPEN_WEEKS_DROPPED: &str = "open_weeks_dropped";
