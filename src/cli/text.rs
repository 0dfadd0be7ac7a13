//! The longer texts of `--help` and `--version`.

/// What people copy first: one line a launcher.
pub const EXAMPLES: &str = "\
Examples:
  In a Slurm job, one rank a task:
    srun --mpi=pmix farm --prompts-file prompts.jsonl --model /scratch/ai/llms/mistral-7b \\
      --output out.jsonl
  Under mpirun, each layer split over two ranks:
    mpirun -n 4 farm --prompts-file prompts.jsonl --model DIR --tensor-parallel 2 \\
      --output out.jsonl
  On a laptop, no launcher, the model read where it lies:
    farm --prompts-file prompts.txt --model DIR --no-stage --max-new-tokens 64";

/// The exit codes that job scripts can rely on.
const EXIT_CODES: &str = "\
Exit codes:
  0   all records written, none failed
  1   an unexpected fault
  2   wrong command line
  3   bad input or model; nothing was done
  4   finished, some records failed
  75  stopped early (a signal, the end of the job's time, --no-wait); the same command
      finishes the rest (--interrupted-exit-code)";

/// The end of `farm --help`.
pub fn examples_and_exit_codes() -> String {
    format!("{EXAMPLES}\n\n{EXIT_CODES}")
}

/// Version and features, as `0.1.0 (features: mpi, cuda for 80,90; not built in: nccl)`.
pub fn version() -> String {
    let features = [
        ("mpi", cfg!(feature = "mpi")),
        ("cuda", cfg!(feature = "cuda")),
        ("nccl", cfg!(feature = "nccl")),
    ];
    let name = |feature: &str| match feature {
        "cuda" if cfg!(feature = "cuda") => format!("cuda for {}", crate::device::built()),
        other => other.to_owned(),
    };
    let list = |on: bool| {
        let names: Vec<_> = features.iter().filter(|f| f.1 == on).map(|f| name(f.0)).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    format!(
        "{} (features: {}; not built in: {})",
        env!("CARGO_PKG_VERSION"),
        list(true),
        list(false)
    )
}
