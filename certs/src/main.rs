//! `clamcast-certs`: makes the certificates and signing keys of a fleet.

use std::process::ExitCode;

fn main() -> ExitCode {
    clamcast_certs::cli::main()
}
