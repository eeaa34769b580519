//! `clamcast-agent`: keeps one host's ClamAV databases at the generation that the fleet's master
//! offers.

use std::process::ExitCode;

use clamcast_agent::operate::cli::{self, Cli};
use clamcast_agent::run;
use clamcast_daemon::exit;
use clap::Parser as _;

fn main() -> ExitCode {
    exit::end("clamcast-agent", cli::run(Cli::parse(), run::daemon))
}
