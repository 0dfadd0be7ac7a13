//! `farm submit` with pretended Slurm commands: what it hands in, and what it refuses before.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use crate::common::farm::{Scratch, files_below, golden};
use crate::common::{Ended, run, without_launcher};

/// Two partitions to use, one of them short, one with GPUs, and one that is down.
const PARTITIONS: &str = "\
main|up|infinite|1/2/0/3|(null)
short|up|10:00|0/1/0/1|(null)
gpu|up|1-00:00:00|0/2/0/2|gpu:a100:4(S:0-1)
down|inact|1:00:00|0/2/0/2|(null)
";

/// Takes the script from standard input and keeps it, unless it is for `short` and that is
/// closed.
const SBATCH: &str = r#"#!/bin/bash
[ "$*" = --parsable ] && [ -z "$SBATCH_PARTITION" ] || exit 9
script=$(</dev/stdin)
if [ -e "$SLURM/closed" ] && [[ $script == *--partition=short* ]]; then
    echo "sbatch: error: Invalid account or account/partition combination specified" >&2
    exit 1
fi
number=$(($(cat "$SLURM/number") + 1))
echo $number > "$SLURM/number"
echo "$script" > "$SLURM/$number.sbatch"
echo "$number;cluster"
"#;

/// A cluster's login node: Slurm's commands, an installed farm, a prompts file.
struct Site {
    scratch: Scratch,
    prompts: PathBuf,
    model: PathBuf,
}

impl Site {
    fn new() -> Self {
        let scratch = Scratch::new();
        for folder in ["bin", "slurm", "root/share/farm/slurm"] {
            fs::create_dir_all(scratch.path(folder)).expect("a folder");
        }
        scratch.file("slurm/number", "100");
        scratch.file("slurm/partitions", PARTITIONS);
        let sinfo =
            "#!/bin/bash\necho \"$*\" > \"$SLURM/sinfo-arguments\"\ncat \"$SLURM/partitions\"\n";
        for (name, script) in [("sinfo", sinfo), ("sbatch", SBATCH)] {
            let file = scratch.file(&format!("bin/{name}"), script);
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("a mode");
        }
        symlink("/bin/cat", scratch.path("bin/cat")).expect("a link");
        for name in ["farm-cpu.sbatch", "farm-gpu.sbatch"] {
            let template = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("slurm").join(name);
            fs::copy(template, scratch.path("root/share/farm/slurm").join(name)).expect("a copy");
        }
        // In place of starting farm: its arguments, as bash read them.
        let job = "farm_job() { printf '%s\\0' \"$@\" > \"$ARGUMENTS\"; }\n";
        scratch.file("root/share/farm/slurm/farm-job.sh", job);
        let prompts = scratch.file("it's 100% \"mine\".txt", "The cat\n");
        Self { scratch, prompts, model: golden("llama_gqa") }
    }

    fn submit(&self, args: &[&str]) -> Command {
        let mut command = without_launcher(Command::new(env!("CARGO_BIN_EXE_farm")));
        command.current_dir(self.scratch.path("")).arg("submit");
        command.arg("--prompts-file").arg(self.prompts.file_name().expect("a name"));
        command.arg("--model").arg(&self.model).args(args);
        command.env("PATH", self.scratch.path("bin")).env("SLURM", self.scratch.path("slurm"));
        command.env("FARM_ROOT", self.scratch.path("root"));
        command
    }

    /// Runs the script that job `number` would run; the arguments that farm would get.
    fn arguments_of_job(&self, number: u32) -> Vec<String> {
        let arguments = self.scratch.path("arguments");
        let script = self.scratch.path(&format!("slurm/{number}.sbatch"));
        run(Command::new("bash").arg(script).env("ARGUMENTS", &arguments)).with_code(0);
        let text = fs::read_to_string(arguments).expect("arguments");
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    fn script_of_job(&self, number: u32) -> String {
        fs::read_to_string(self.scratch.path(&format!("slurm/{number}.sbatch"))).expect("a script")
    }

    fn nothing_was_submitted(&self) {
        assert_eq!(fs::read_to_string(self.scratch.path("slurm/number")).unwrap(), "100");
        assert!(!self.scratch.path("farm-runs").exists(), "nothing is left behind");
    }
}

fn stdout(ended: &Ended) -> String {
    String::from_utf8(ended.stdout.clone()).expect("UTF-8")
}

#[test]
fn every_partition_gets_a_job_on_one_run() {
    let site = Site::new();
    let args = ["--partitions=all", "--stats", "--stop", "it's\r\n", "--stop=--", "--nodes", "2"];
    let mut command = site.submit(&args);
    // A variable of the login shell must hold for all jobs, and not choose their partition.
    command.env("FARM_TEMPERATURE", "0.5").env("FARM_QUIET", "0").env("SBATCH_PARTITION", "main");
    let ended = run(&mut command).with_code(0);
    let printed = stdout(&ended);
    let lines: Vec<&str> = printed.lines().collect();
    let jobs =
        ["job 101 in partition main", "job 102 in partition short", "job 103 in partition gpu"];
    assert_eq!(lines[..3], jobs, "{}", ended.stderr);
    assert!(lines[3].starts_with("farm status '/") && lines.len() == 4, "{printed}");

    let arguments = site.arguments_of_job(101);
    for number in [102, 103] {
        assert_eq!(site.arguments_of_job(number), arguments, "one run");
    }
    let value = |flag: &str| {
        let value = |argument: &String| argument.strip_prefix(flag).map(PathBuf::from);
        arguments.iter().find_map(value).unwrap_or_else(|| panic!("{flag} in {arguments:?}"))
    };
    assert_eq!(arguments[0], "generate");
    assert_eq!(fs::canonicalize(value("--prompts-file=")).unwrap(), site.prompts);
    let run_dir = value("--run-dir=");
    assert!(run_dir.is_absolute() && run_dir.join("logs").is_dir(), "{run_dir:?}");
    assert_eq!(value("--output="), run_dir.join("output.jsonl"));
    for word in ["--stats", "--temperature=0.5", "--stop=it's\r\n", "--stop=--"] {
        assert!(arguments.iter().any(|argument| argument == word), "{word} in {arguments:?}");
    }
    assert_eq!(arguments.len(), 9, "{arguments:?}");

    for (number, options) in [
        (101, &["--partition=main", "--nodes=2", "--job-name=farm-it_s_100___mine_"][..]),
        (102, &["--partition=short", "--nodes=2", "--time=10:00"]),
        (103, &["--partition=gpu", "--ntasks-per-node=4", "--gpus-per-node=4"]),
    ] {
        let script = site.script_of_job(number);
        for option in options {
            let line = format!("#SBATCH {option}");
            assert!(script.lines().any(|l| l == line), "{line} in {script}");
        }
        assert!(!script.contains('\r') && script.contains("100%%"), "{script}");
        assert_eq!(script.contains("--time=10:00"), number == 102, "{script}");
    }
    let sinfo = fs::read_to_string(site.scratch.path("slurm/sinfo-arguments")).unwrap();
    assert!(!sinfo.contains("--all"), "{sinfo}");
}

#[test]
fn a_dry_run_prints_the_scripts_and_does_nothing() {
    let site = Site::new();
    let args = ["--partitions=gpu,short", "--dry-run", "--time=5", "--ntasks-per-node=2"];
    let more = ["--account=a b", "--qos=low", "--sbatch-arg=--constraint=x", "--output=o.jsonl"];
    let ended = run(&mut site.submit(&[&args[..], &more[..]].concat())).with_code(0);
    let printed = stdout(&ended);
    let scripts: Vec<&str> = printed.split("#!/bin/bash\n").skip(1).collect();
    assert_eq!(scripts.len(), 2, "{printed}");
    for line in ["--account='a b'", "--qos=low", "--constraint=x", "--time=5"] {
        let count = scripts.iter().filter(|s| s.contains(&format!("\n#SBATCH {line}\n"))).count();
        assert_eq!(count, 2, "{line} in {printed}");
    }
    assert!(scripts[0].contains("--partition=gpu\n") && scripts[0].contains("-node=2\n"));
    assert!(
        scripts[0].contains("\n#SBATCH --gpus-per-node=2\n") && !scripts[1].contains("gpus-per")
    );
    assert!(scripts[1].contains("/o.jsonl"), "{printed}");
    site.nothing_was_submitted();
    assert!(!files_below(&site.scratch.path("")).iter().any(|file| file.ends_with("o.jsonl")));
}

#[test]
fn a_partition_that_refuses_is_named_and_the_others_go_on() {
    let site = Site::new();
    site.scratch.file("slurm/closed", "");
    let ended = run(&mut site.submit(&["--partitions=short,main"])).with_code(0);
    assert!(stdout(&ended).starts_with("job 101 in partition main\nfarm status "));
    assert!(ended.stderr.contains("partition short") && ended.stderr.contains("Invalid account"));
    let ended = run(&mut site.submit(&["--partitions=short"])).with_code(1);
    assert!(ended.stderr.contains("no partition") && ended.stdout.is_empty(), "{}", ended.stderr);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_submitted() {
    let refused = |site: &Site, mut command: Command, code: i32, what: &str| {
        let ended = run(&mut command).with_code(code);
        assert!(ended.stderr.contains(what), "{what} in {}", ended.stderr);
        assert!(ended.stdout.is_empty());
        site.nothing_was_submitted();
    };
    let site = Site::new();
    let no_such = ["--partitions=main,nix"];
    refused(&site, site.submit(&no_such), 3, "main, short, gpu, down");
    for (args, code, what) in [
        (&["--local-ranks=2"][..], 2, "--ntasks-per-node"),
        (&["--force-new"], 2, "--run-dir"),
        (&["--sbatch-arg=main"], 2, "--sbatch-arg"),
        (&["--time=soon"], 2, "--time"),
        (&["--command=score", "--top-k=3"], 2, "--top-k"),
        (&["--max-seq-len=999999999"], 3, "--max-seq-len"),
        (&["--run-dir=a\\b"], 3, "--run-dir"),
    ] {
        refused(&site, site.submit(&[&["--partitions=all"], args].concat()), code, what);
    }
    let with = |name: &str, value: &OsStr| {
        let mut command = site.submit(&["--partitions=all"]);
        command.env(name, value);
        command
    };
    refused(&site, with("FARM_ROOT", OsStr::new("/nowhere")), 3, "FARM_ROOT");
    refused(&site, with("PATH", OsStr::new("/nowhere")), 3, "sinfo is not on PATH");

    let mut stdin = without_launcher(Command::new(env!("CARGO_BIN_EXE_farm")));
    stdin.args(["submit", "--partitions=all", "--prompts-file=-", "--model"]);
    stdin.arg(golden("llama_gqa"));
    refused(&site, stdin, 2, "standard input");

    // The pretended Slurm would take it.
    let mut bad = Site::new();
    bad.model = bad.scratch.model("llama_gqa");
    fs::remove_file(bad.model.join("tokenizer.json")).expect("a model to damage");
    refused(&bad, bad.submit(&["--partitions=all"]), 3, "tokenizer");

    fs::remove_file(site.scratch.path("bin/sbatch")).expect("a command");
    let ended = run(&mut site.submit(&["--partitions=all"])).with_code(3);
    assert!(ended.stderr.contains("sbatch is not on PATH"), "{}", ended.stderr);
}
