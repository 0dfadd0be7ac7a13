//! The flags that a command line and its environment gave, in one form: what a later start
//! must be given to be the same run, and what a run's record of itself shows.

use std::ffi::{OsStr, OsString};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

/// One flag that was given; a flag that may be repeated is one of these each time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenFlag {
    /// The long name, without dashes; empty for a word without a flag.
    pub name: String,
    /// Its value; `None` for a switch.
    pub value: Option<OsString>,
    /// Whether it stood on the command line, not in its `FARM_…` variable.
    pub on_command_line: bool,
}

impl GivenFlag {
    /// One word of a command line: `--name=value`, which holds values that begin with `-` too.
    pub fn word(&self) -> OsString {
        let value = self.value.as_deref();
        match self.name.as_str() {
            "" => value.unwrap_or_default().to_owned(),
            name => flag_word(name, value),
        }
    }
}

/// `--name=value`, or `--name` for a switch.
pub fn flag_word(name: &str, value: Option<&OsStr>) -> OsString {
    let mut word = OsString::from(format!("--{name}"));
    if let Some(value) = value {
        word.push("=");
        word.push(value);
    }
    word
}

/// All that is not a default, in the order of the help; `matches` is what `command` (a
/// subcommand) parsed. Switches that a variable turned off are left out.
pub fn given_flags(command: &Command, matches: &ArgMatches) -> Vec<GivenFlag> {
    let given =
        |arg: &&Arg| matches!(source(matches, arg), Some(s) if s != ValueSource::DefaultValue);
    let args = command.get_arguments().filter(given);
    args.flat_map(|arg| {
        let id = arg.get_id().as_str();
        let values: Vec<Option<OsString>> = match arg.get_action().takes_values() {
            true => {
                let raw = matches.get_raw(id).into_iter().flatten();
                raw.map(|value| Some(value.to_owned())).collect()
            }
            false if matches.get_flag(id) => vec![None],
            false => Vec::new(),
        };
        let on_command_line = source(matches, arg) == Some(ValueSource::CommandLine);
        let name = arg.get_long().unwrap_or_default();
        values.into_iter().map(move |value| GivenFlag {
            name: name.to_owned(),
            value,
            on_command_line,
        })
    })
    .collect()
}

/// Where an argument's value came from; `None` for what has none (`--help`).
fn source(matches: &ArgMatches, arg: &Arg) -> Option<ValueSource> {
    // `value_source` panics on a name that the matches do not know.
    let id = arg.get_id().as_str();
    matches.try_contains_id(id).ok()?.then(|| matches.value_source(id)).flatten()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    /// The words that a `farm generate` with these arguments gives back.
    fn words(args: &[OsString]) -> Vec<OsString> {
        let command = Cli::command();
        let command = command.find_subcommand("generate").unwrap();
        let name = [OsString::from("generate")];
        let matches = command.clone().get_matches_from(name.iter().chain(args));
        given_flags(command, &matches).iter().map(GivenFlag::word).collect()
    }

    fn text(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn both_forms_come_back_as_one_and_defaults_do_not() {
        let given = text(&[
            "--model",
            "m",
            "--stop",
            "--",
            "--prompts-file=a b",
            "--temperature=-0",
            "--chat",
            "--stop=x=\n",
        ]);
        let expected = text(&[
            "--prompts-file=a b",
            "--chat",
            "--temperature=-0",
            "--stop=--",
            "--stop=x=\n",
            "--model=m",
        ]);
        assert_eq!(words(&given), expected);
        assert_eq!(words(&expected), expected, "what comes back means the same");
    }

    #[test]
    fn bytes_that_are_not_text_stay_as_they_are() {
        let file = OsString::from_vec(b"--prompts-file=\xff\n.jsonl".to_vec());
        let given = [file, "--model=m".into()];
        assert_eq!(words(&given), given);
    }

    /// The body of the next test's child process; does nothing in the ordinary run.
    #[test]
    fn child_reads_the_environment() {
        if std::env::var_os("FARM_GIVEN_TEST_CHILD").is_none() {
            return;
        }
        let expected =
            text(&["--prompts-file=p", "--chat", "--temperature=0.5", "--seed=9", "--model=m"]);
        assert_eq!(words(&text(&["--seed", "9", "--model", "m"])), expected);
    }

    /// The job that is submitted must not depend on the variables of the node it runs on.
    #[test]
    fn variables_come_back_as_flags() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cli::given::tests::child_reads_the_environment"])
            .envs([("FARM_GIVEN_TEST_CHILD", "1"), ("FARM_TEMPERATURE", "0.5"), ("FARM_SEED", "8")])
            .envs([("FARM_PROMPTS_FILE", "p"), ("FARM_QUIET", "0"), ("FARM_CHAT", "yes")])
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
    }
}
