//! The command line is an interface: defaults, ranges, names of the environment twins.

use proptest::prelude::*;

use super::*;

const REQUIRED: [&str; 5] = ["farm", "--prompts-file", "p.jsonl", "--model", "m"];

fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
    let args = args.iter().map(OsString::from).collect();
    Cli::parse_args(with_default_command(args, |_| false))
}

fn generate(extra: &[&str]) -> Result<GenerateArgs, clap::Error> {
    parse(&[&REQUIRED[..], extra].concat()).map(|cli| match cli.command {
        Command::Generate(args) => *args,
        other => panic!("not generate: {other:?}"),
    })
}

#[test]
fn clap_finds_no_contradiction() {
    Cli::command().debug_assert();
}

#[test]
fn every_long_flag_has_its_environment_twin() {
    for command in Cli::command().get_subcommands() {
        for arg in command.get_arguments() {
            let Some(long) = arg.get_long().filter(|long| *long != "help") else { continue };
            let twin = format!("FARM_{}", long.replace('-', "_").to_uppercase());
            let found = arg.get_env().map(|name| name.to_string_lossy().into_owned());
            assert_eq!(found, Some(twin), "{} --{long}", command.get_name());
        }
    }
}

#[test]
fn only_the_commands_that_work_are_listed() {
    let command = Cli::command();
    let names: Vec<_> = command.get_subcommands().map(|c| c.get_name()).collect();
    assert_eq!(
        names,
        [
            "generate", "score", "finetune", "retry", "status", "submit", "merge", "stage",
            "inspect", "report"
        ]
    );
}

#[test]
fn generate_is_the_default_command() {
    let line = |text: &str, variable: bool| {
        let args = text.split(' ').map(OsString::from).collect();
        let args = with_default_command(args, |name| variable && name == "FARM_PROMPTS_FILE");
        args.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    };
    for (given, variable, expected) in [
        ("farm --model m --prompts-file p", false, "farm generate --model m --prompts-file p"),
        ("farm generate --model m", false, "farm generate --model m"),
        ("farm score --model m", false, "farm score --model m"),
        ("farm --help", false, "farm --help"),
        ("farm -V", false, "farm -V"),
        ("farm help generate", false, "farm help generate"),
        ("farm", false, "farm"),
        ("farm", true, "farm generate"),
    ] {
        assert_eq!(line(given, variable), expected);
    }
}

#[test]
fn flags_that_are_not_given_stay_open_for_the_models_own_defaults() {
    let args = generate(&[]).unwrap();
    let s = &args.sampling;
    assert!(s.temperature.is_none() && s.max_new_tokens.is_none() && s.seed.is_none());
    assert_eq!(args.staging.stage_dir, PathBuf::from("/dev/shm"));
    assert_eq!((args.parallelism.tensor_parallel, args.output.interrupted_exit_code), (1, 75));
}

#[test]
fn values_arrive() {
    let args = generate(&[
        "--temperature=0.7",
        "--top-p",
        "0.9",
        "--presence-penalty",
        "-1.5",
        "--stop",
        "--",
        "--stop",
        "\n",
        "--kv-cache-memory",
        "8GiB",
        "--stage-fallback",
        "in-place",
        "--chat",
        "--generation-config",
        "none",
        "--dtype",
        "bf16",
        "--kernel-tier",
        "avx512",
        "--logprobs",
        "0",
    ])
    .unwrap();
    let s = &args.sampling;
    assert_eq!((s.temperature, s.top_p, s.presence_penalty), (Some(0.7), Some(0.9), Some(-1.5)));
    assert_eq!(s.stop, ["--", "\n"]);
    assert_eq!(args.record.logprobs, Some(0));
    assert_eq!(s.generation_config, GenerationConfigSource::Ignore);
    assert_eq!(args.model.kv_cache_memory, Some(8 << 30));
    assert_eq!(args.staging.stage_fallback, StageFallback::InPlace);
    assert!(args.input.chat);
}

#[test]
fn what_is_taken_at_once_depends_on_the_device_where_no_flag_says() {
    let limits = |flags: &[&str], on_device| {
        let BatchLimits { sequences, tokens } =
            generate(flags).unwrap().model.batch_limits(on_device);
        (sequences, tokens)
    };
    assert_eq!((limits(&[], false), limits(&[], true)), ((32, 512), (256, 4096)));
    let given = ["--max-batch-size", "8", "--max-batched-tokens", "64"];
    assert_eq!((limits(&given, false), limits(&given, true)), ((8, 64), (8, 64)));
}

#[test]
fn devices_have_names() {
    let device = |name: &str| generate(&["--device", name]).map(|args| args.model.weights.device);
    assert_eq!(generate(&[]).unwrap().model.weights.device, DeviceKind::Auto);
    assert_eq!(device("cuda").unwrap(), DeviceKind::Cuda);
    let error = device("gpu").unwrap_err().to_string();
    assert!(error.contains("[possible values: auto, cpu, cuda]"), "{error}");
}

#[test]
fn what_is_out_of_range_is_a_usage_error() {
    for wrong in [
        "--temperature=-0.1",
        "--temperature=nan",
        "--temperature=inf",
        "--temperature=warm",
        "--top-p=0",
        "--top-p=1.01",
        "--min-p=-0.1",
        "--min-p=1.1",
        "--repetition-penalty=0",
        "--presence-penalty=2.1",
        "--frequency-penalty=-2.1",
        "--max-new-tokens=0",
        "--top-k=-1",
        "--seed=-1",
        "--stop=",
        "--logprobs=21",
        "--max-batch-size=0",
        "--max-seq-len=0",
        "--max-batch-size=65537",
        "--max-batched-tokens=0",
        "--kv-cache-memory=8XB",
        "--kv-cache-memory=0",
        "--dtype=f64",
        "--kernel-tier=sse",
        "--tensor-parallel=0",
        "--local-ranks=0",
        "--threads=0",
        "--threads=100000",
        "--stage-fallback=maybe",
        "--generation-config=no",
        "--prompts-format=xml",
        "--prompt-column=",
        "--log-format=xml",
        "--progress=no",
        "--interrupted-exit-code=256",
        "--interrupted-exit-code=0",
        "--no-such-flag",
        "stray",
    ] {
        let error = generate(&[wrong]).expect_err(wrong);
        assert_eq!(error.exit_code(), 2, "{wrong}: {error}");
    }
    assert!(generate(&["--resume", "--force-new"]).is_err());
    assert_eq!(parse(&["farm", "--model", "m"]).unwrap_err().exit_code(), 2);
    assert_eq!(parse(&["farm"]).unwrap_err().exit_code(), 2);
}

/// `--quiet` silences progress and table, `--stats` asks for the table all the same.
#[test]
fn who_sees_the_closing_table() {
    for (flags, progress, table) in [
        (&[][..], ProgressMode::Auto, true),
        (&["--quiet"], ProgressMode::None, false),
        (&["--quiet", "--stats"], ProgressMode::None, true),
        (&["--progress", "none"], ProgressMode::None, false),
        (&["--progress=none", "--stats"], ProgressMode::None, true),
        (&["--progress=line"], ProgressMode::Line, true),
    ] {
        let args = generate(flags).unwrap();
        let shown = (args.output.progress(&args.log), args.output.closing_table(&args.log));
        assert_eq!(shown, (progress, table), "{flags:?}");
    }
}

#[test]
fn help_and_version_say_what_people_look_for() {
    let text = |args: &[&str]| parse(args).unwrap_err().to_string();
    let top = text(&["farm", "--help"]);
    for part in ["srun --mpi=pmix farm", "mpirun -n 4 farm", "Exit codes:", "generate", "report"] {
        assert!(top.contains(part), "{part} in {top}");
    }
    let generate = text(&["farm", "generate", "--help"]);
    for heading in ["Input", "Sampling", "Model", "Parallelism", "Staging", "Output"] {
        assert!(generate.contains(&format!("\n{heading}:\n")), "{heading} in {generate}");
    }
    assert!(!generate.contains("FARM_MODEL") && top.contains("FARM_MAX_NEW_TOKENS"));
    for line in top.lines().chain(generate.lines()) {
        assert!(line.chars().count() <= 100, "{line}");
    }
    let version = text(&["farm", "--version"]);
    assert!(version.contains("features: ") && version.contains("mpi"), "{version}");
}

/// The body of the next test's child process; does nothing in the ordinary run.
#[test]
fn child_reads_the_environment() {
    if std::env::var_os("FARM_CLI_TEST_CHILD").is_none() {
        return;
    }
    let args = parse(&["farm", "generate", "--seed", "9"]).unwrap();
    let Command::Generate(args) = args.command else { panic!("not generate") };
    assert_eq!(args.model.weights.model, PathBuf::from("from-env"));
    assert_eq!(args.sampling.seed, Some(9), "a flag beats the environment");
    assert!(args.log.quiet && !args.input.chat, "1 and 0 are read as switches");
}

/// A modulefile or a job script sets defaults; tested in a child, whose environment is its own.
#[test]
fn the_environment_sets_defaults() {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cli::tests::child_reads_the_environment"])
        .envs([("FARM_CLI_TEST_CHILD", "1"), ("FARM_MODEL", "from-env"), ("FARM_SEED", "8")])
        .envs([("FARM_PROMPTS_FILE", "p"), ("FARM_QUIET", "1"), ("FARM_CHAT", "0")])
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn byte_counts_take_the_usual_units() {
    for (text, expected) in [
        ("1", 1),
        ("1024b", 1024),
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8 gb", 8_000_000_000),
        ("1.5K", 1536),
        ("2TiB", 2 << 40),
    ] {
        assert_eq!(values::bytes(text), Ok(expected), "{text}");
    }
    for wrong in
        ["", "G", "1.2.3G", "-1", "8Q", "0", "0.1", "99999999999999999999", "9e9T", "17000000TiB"]
    {
        assert!(values::bytes(wrong).is_err(), "{wrong}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// No text makes a value parser panic, and what passes is in range.
    #[test]
    fn value_parsers_never_panic(text in "[-0-9.eGiBnaf ]{0,12}") {
        let _ = values::bytes(&text);
        if let Ok(x) = values::nucleus_mass(&text) { prop_assert!(x > 0.0 && x <= 1.0); }
        if let Ok(x) = values::penalty(&text) { prop_assert!((-2.0..=2.0).contains(&x)); }
    }
}
