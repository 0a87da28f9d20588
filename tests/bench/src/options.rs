//! What is run, and how large.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Measures Lethe against the raw cost of the same work. Needs the servers that `make
/// bench` names in the environment, and release binaries beside itself.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Small sizes
    #[arg(long, global = true)]
    quick: bool,
    #[command(flatten)]
    flags: Flags,
    /// Folder for the figures
    #[arg(long, global = true, default_value = "target/bench", value_name = "FOLDER")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The table: each row against its raw baseline
    Rows {
        /// Which rows; all of them where none is named
        names: Vec<RowName>,
    },
    /// The gain over earlier binaries, by turns with them
    Gain {
        /// Folder of the earlier release binaries, with their `lethe-bench`
        #[arg(long, value_name = "FOLDER")]
        before: PathBuf,
        /// Which rows; all of them where none is named
        names: Vec<RowName>,
    },
    /// What a scheduler and an operator wait for beside years of data
    Scale {
        /// Which rows; all of them where none is named
        names: Vec<ScaleName>,
    },
    /// How cost grows with identities, event batches, workers and sizes
    Growth {
        /// Which curves; all of them where none is named
        names: Vec<CurveName>,
    },
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RowName {
    Intake,
    /// Intake for many controllers, so that hardly two requests of a group are of the same
    Controllers,
    /// Erasure of people who lie scattered, and in order
    Erasure,
    Compile,
    Callbacks,
    /// Callbacks to one endpoint only
    OneEndpoint,
    Answers,
    Release,
    EndToEnd,
    /// `lethe import` of profiles and of event batches
    Import,
    /// Status, group status and submit over HTTP
    Http,
    /// WAL, rows and bytes of one request
    Writes,
    Latency,
    Idle,
}

/// A row of the table of scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScaleName {
    /// The time of a round of the scheduler
    Round,
    /// How late a batch is released
    Lateness,
    /// The time of each command of the runbook
    Commands,
    /// How long a controller waits beside one whose tables are locked
    Neighbour,
    /// How long the largest subjects take where statements may take three seconds
    Large,
}

/// A curve of growth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CurveName {
    /// Intake and erasure per request against the number of identities
    Identities,
    /// Erasure against event batches a profile
    EventBatches,
    /// Throughput against workers of a kind
    Workers,
    /// Memory of each worker against queue length, batch size and result size
    Memory,
}

macro_rules! sizes {
    ($($(#[doc = $doc:literal])+ $name:ident: $full:expr, $quick:expr;)+) => {
        #[derive(Debug, Args)]
        struct Flags {
            $($(#[doc = $doc])+
            #[arg(long, global = true, value_name = "NUMBER")]
            $name: Option<u64>,)+
        }

        /// How large everything is.
        #[derive(Clone, Copy, Debug, serde::Serialize)]
        pub(crate) struct Sizes {
            $($(#[doc = $doc])+
            pub(crate) $name: u64,)+
        }

        impl Options {
            /// What was said of sizes, as arguments for another benchmark; not the runs.
            pub(crate) fn arguments(&self) -> Vec<String> {
                let said = [$((concat!("--", stringify!($name)), self.flags.$name)),+];
                let said = said.into_iter().filter(|(name, _)| *name != "--runs");
                let sizes = said.filter_map(|(name, size)| Some([name.replace('_', "-"), size?.to_string()])).flatten();
                self.quick.then(|| "--quick".to_owned()).into_iter().chain(sizes).collect()
            }

            /// The sizes by flags, otherwise those of the full or the quick form.
            pub(crate) fn sizes(&self) -> Sizes {
                Sizes { $($name: self.flags.$name.unwrap_or(if self.quick { $quick } else { $full }),)+ }
            }
        }
    };
}

sizes! {
    /// Runs of each side; figures are medians [default: 3]
    runs: 3, 3;
    /// Profiles, three identities each, that requests are matched against [default: 1000000, quick 50000]
    profiles: 1_000_000, 50_000;
    /// Requests of the row intake [default: 100000, quick 10000]
    intake_requests: 100_000, 10_000;
    /// Requests of the row answers [default: 20000, quick 4000]
    answered_requests: 20_000, 4_000;
    /// Rows of the row erasure, of all three tables [default: 1000000, quick 70000]
    erased_rows: 1_000_000, 70_000;
    /// Event batches a profile in the rows erasure and end to end [default: 10]
    event_batches: 10, 10;
    /// Subject data of the row compile, in MB [default: 512, quick 64]
    compiled_mb: 512, 64;
    /// Deliveries of the row callbacks [default: 50000, quick 6000]
    callbacks: 50_000, 6_000;
    /// Deliveries of the row one endpoint [default: 20000, quick 3000]
    callbacks_of_one: 20_000, 3_000;
    /// Controllers of the row controllers [default: 1000, quick 100]
    controllers: 1_000, 100;
    /// Endpoints of the row callbacks [default: 50]
    endpoints: 50, 50;
    /// Requests of the row release [default: 200000, quick 20000]
    released_requests: 200_000, 20_000;
    /// Requests of the row end to end [default: 20000, quick 3000]
    chained_requests: 20_000, 3_000;
    /// Profiles of the row import [default: 50000, quick 5000]
    imported_profiles: 50_000, 5_000;
    /// Event batches of the row import [default: 500000, quick 50000]
    imported_batches: 500_000, 50_000;
    /// Calls of each kind of the row http [default: 20000, quick 2000]
    calls: 20_000, 2_000;
    /// Requests of the row latency, one after the other [default: 500, quick 100]
    single_requests: 500, 100;
    /// Seconds over which an idle fleet is watched [default: 30, quick 10]
    idle_seconds: 30, 10;
    /// Messages that the raw intake takes into one transaction [default: 256, as the matcher does]
    raw_group: 256, 256;
    /// Identities of the largest point of the curve identities [default: 10000000, quick 100000]
    most_identities: 10_000_000, 100_000;
    /// Event batches a profile of the largest point of that curve [default: 1000, quick 100]
    most_event_batches: 1_000, 100;
    /// Finished requests of the first size of scale [default: 1000000, quick 100000]
    scale_requests: 1_000_000, 100_000;
    /// Finished requests of its second size [default: 3000000, quick none]
    most_scale_requests: 3_000_000, 0;
    /// Endpoints of scale [default: 100000, quick 10000]
    scale_endpoints: 100_000, 10_000;
    /// Slices of the busy controller of the row neighbour [default: 4000, quick 400]
    scale_slices: 4_000, 400;
    /// Event batches of 200 kB of the row large [default: 10000, quick 500]
    scale_batches: 10_000, 500;
    /// Profiles of the row large [default: 300000, quick 15000]
    scale_profiles: 300_000, 15_000;
}
