//! The `farm` binary: parse, run, leave with the agreed exit code.

fn main() {
    let cli = farm::cli::Cli::parse_or_exit();
    // A panic, already printed, is an unexpected fault to whoever reads the exit code.
    let fault = farm::ErrorKind::Fault.exit_code();
    let code = std::panic::catch_unwind(|| farm::commands::run(&cli)).unwrap_or(fault);
    std::process::exit(code);
}
