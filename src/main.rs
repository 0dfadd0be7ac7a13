//! The `farm` binary: parse, run, leave with the agreed exit code.

fn main() {
    let cli = farm::cli::Cli::parse_or_exit();
    std::process::exit(farm::commands::run(&cli));
}
