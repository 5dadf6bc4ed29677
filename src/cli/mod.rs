//! Arguments to configuration to one of the commands.

pub mod verify;

/// Runs the command line; the exit code is 0, 1 (failed) or 2 (bad arguments).
pub fn main() -> std::process::ExitCode {
    unimplemented!()
}
