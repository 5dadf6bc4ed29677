//! The binary: hands the command line to `cli`.

fn main() -> std::process::ExitCode {
    polylora::cli::main()
}
