//! A batch script of farm: one of the installed templates, with a job's options and
//! arguments written in.
//!
//! What a user may read, keep and hand in by hand is plain text that holds everything: no
//! option of the job is passed beside it. Left out: calling `sbatch`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Error, Result};

/// The line of a template that starts farm.
const RUN_LINE: &str = "farm_job \"$@\"";
/// How the line begins that says where farm is installed.
const ROOT_LINE: &str = "export FARM_ROOT=";
/// How an option of the job begins.
const OPTION: &str = "#SBATCH ";

/// What sets a template's job apart from others.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// sbatch's options, `--name=value` each, unquoted. They win over the template's.
    pub options: &'a [String],
    /// Where farm is installed.
    pub root: &'a Path,
    /// farm's arguments.
    pub arguments: &'a [OsString],
}

/// The template's text with the job's options behind its own (of two equal ones sbatch takes
/// the last), its farm and farm's arguments.
///
/// # Errors
/// An input error where the text lacks what a template of farm has, or an option cannot be
/// written as a line.
pub fn render(template: &str, job: &Job) -> Result<String> {
    let lines: Vec<&str> = template.lines().collect();
    // sbatch stops looking for options at the first command.
    let is_comment = |line: &&str| line.is_empty() || line.starts_with('#');
    let head = lines.iter().take_while(|line| is_comment(line));
    let last_option = head.enumerate().filter(|(_, line)| line.starts_with(OPTION)).last();
    let (Some((last_option, _)), true) = (last_option, lines.contains(&RUN_LINE)) else {
        return Err(Error::input(format!(
            "not a batch template of farm: no `{}…` above the first command, or no `{RUN_LINE}`",
            OPTION
        )));
    };
    let mut script = String::new();
    for (number, line) in lines.iter().enumerate() {
        match *line {
            RUN_LINE => script.push_str(&run_lines(job.arguments)),
            line if line.starts_with(ROOT_LINE) => {
                script.push_str(&format!("{ROOT_LINE}{}\n", shell_word(job.root.as_os_str())));
            }
            line => script.push_str(&format!("{line}\n")),
        }
        if number == last_option {
            script.push_str("# By farm submit; they win over those above:\n");
            for option in job.options {
                script.push_str(&format!("{OPTION}{}\n", option_word(option)?));
            }
        }
    }
    Ok(script)
}

/// The value of option `--name=` in a template; its last one, which is the one that counts.
pub fn option<'a>(template: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| {
        line.strip_prefix(OPTION)?.trim().strip_prefix("--")?.strip_prefix(name)?.strip_prefix('=')
    };
    template.lines().filter_map(value).next_back()
}

/// Variables of sbatch that would win over `options` in a script.
pub fn variables_against(options: &[String]) -> impl Iterator<Item = &'static str> {
    const VARIABLES: [(&str, &str); 7] = [
        ("--account=", "SBATCH_ACCOUNT"),
        ("--gpus-per-node=", "SBATCH_GPUS_PER_NODE"),
        ("--job-name=", "SBATCH_JOB_NAME"),
        ("--output=", "SBATCH_OUTPUT"),
        ("--partition=", "SBATCH_PARTITION"),
        ("--qos=", "SBATCH_QOS"),
        ("--time=", "SBATCH_TIMELIMIT"),
    ];
    let given = |name: &str| options.iter().any(|option| option.starts_with(name));
    VARIABLES.into_iter().filter(move |(name, _)| given(name)).map(|(_, variable)| variable)
}

/// The start of farm, an argument a line. What FARM_ARGS would add has not been checked and
/// may not be the same in all jobs.
fn run_lines(arguments: &[OsString]) -> String {
    let words: Vec<String> = arguments.iter().map(|argument| shell_word(argument)).collect();
    format!("unset FARM_ARGS FARM_PROMPTS_PATTERN\nfarm_job {}\n", words.join(" \\\n    "))
}

/// A word that bash reads as exactly these bytes, on one line and in UTF-8: sbatch refuses
/// scripts with `\r\n`.
pub fn shell_word(word: &OsStr) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-./:=,+@%".contains(byte);
    let bytes = word.as_bytes();
    match word.to_str() {
        Some(text) if !bytes.is_empty() && bytes.iter().all(plain) => text.to_owned(),
        Some(text) if !text.chars().any(char::is_control) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        _ => {
            let escape = |byte: u8| match byte {
                b'\'' | b'\\' => format!("\\{}", char::from(byte)),
                b'\n' => "\\n".to_owned(),
                b' '..=b'~' => char::from(byte).to_string(),
                // A character's bytes may follow one another escaped: bash puts bytes together.
                _ => format!("\\{byte:03o}"),
            };
            format!("$'{}'", bytes.iter().map(|&byte| escape(byte)).collect::<String>())
        }
    }
}

/// An option as sbatch reads it from a script: `#` begins a comment unless quoted, and `\`
/// escapes, also between quotes.
fn option_word(option: &str) -> Result<String> {
    if option.chars().any(char::is_control) {
        return Err(Error::input(format!(
            "{option:?}: an option of a batch job cannot hold a line break or other control \
             character"
        )));
    }
    let plain = |c: char| c.is_alphanumeric() || "_-./:=,+@%()[]&|*".contains(c);
    if option.chars().all(plain) {
        return Ok(option.to_owned());
    }
    // Each side of the first `=` on its own keeps the option's name readable.
    let quoted = |text: &str| format!("'{}'", text.replace('\\', r"\\").replace('\'', r"'\''"));
    Ok(match option.split_once('=') {
        Some((name, value)) if name.chars().all(plain) => format!("{name}={}", quoted(value)),
        _ => quoted(option),
    })
}

/// A name of letters, digits, `.`, `-` and `_` that resembles `text`: it becomes part of file
/// names and of what `squeue` shows.
pub fn job_name(text: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' };
    text.chars().map(keep).take(64).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    const TEMPLATES: [&str; 2] =
        [include_str!("../../slurm/farm-cpu.sbatch"), include_str!("../../slurm/farm-gpu.sbatch")];

    fn rendered(template: &str, options: &[&str], arguments: &[&str]) -> Result<String> {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let root = Path::new("/apps/my farm");
        render(template, &Job { options: &options, root, arguments: &arguments })
    }

    #[test]
    fn options_stand_last_among_the_templates_and_above_the_first_command() {
        for template in TEMPLATES {
            let script =
                rendered(template, &["--partition=main", "--time=10:00"], &["generate"]).unwrap();
            let lines: Vec<&str> = script.lines().collect();
            let place = |text: &str| lines.iter().position(|line| *line == text).expect(text);
            let ours = place("#SBATCH --partition=main");
            assert_eq!(place("#SBATCH --time=10:00"), ours + 1);
            assert!(!lines[ours + 2..].iter().any(|line| line.starts_with(OPTION)), "{script}");
            assert!(place("#SBATCH --time=01:00:00") < ours);
            assert!(ours < place("export FARM_ROOT='/apps/my farm'"));
            assert!(lines[..ours].iter().all(|line| line.is_empty() || line.starts_with('#')));
            assert_eq!(lines.last(), Some(&"farm_job generate"));
            assert_eq!(lines.first(), Some(&"#!/bin/bash"));
            assert!(!script.contains("@PREFIX@") && !script.contains("$@"));
            assert_eq!(option(&script, "time"), Some("10:00"));
        }
        assert_eq!(option(TEMPLATES[0], "account"), None, "a line that is commented out");
    }

    #[test]
    fn what_is_not_a_template_is_refused() {
        let no_options = TEMPLATES[0].replace(OPTION, "# ");
        let no_run = TEMPLATES[0].replace(RUN_LINE, "srun farm");
        let too_late = format!("echo\n{}", TEMPLATES[0]);
        for text in ["", &no_options, &no_run, &too_late] {
            let error = rendered(text, &[], &[]).unwrap_err();
            assert!(error.message.contains("template"), "{error}");
        }
        assert!(rendered(TEMPLATES[0], &["--comment=a\nb"], &[]).is_err());
    }

    /// The quoted forms are those that Slurm 22.05 was seen to read as meant.
    #[test]
    fn options_are_quoted_as_sbatch_reads_them() {
        for (option, expected) in [
            ("--constraint=a&(b|c)", "--constraint=a&(b|c)"),
            ("--nodelist=n[1-4]", "--nodelist=n[1-4]"),
            ("--exclusive", "--exclusive"),
            ("--comment=a b # c", "--comment='a b # c'"),
            ("--comment=a#b", "--comment='a#b'"),
            ("--comment=it's", r"--comment='it'\''s'"),
            (r"--comment=a\b", r"--comment='a\\b'"),
            ("-C my feature", "'-C my feature'"),
            ("--output=/a b/%x-%j.out", "--output='/a b/%x-%j.out'"),
        ] {
            assert_eq!(option_word(option).unwrap(), expected);
        }
    }

    #[test]
    fn variables_that_would_win_are_those_of_given_options() {
        let options = ["--partition=a".to_owned(), "--time=1".to_owned(), "--nodes=2".to_owned()];
        let variables: Vec<_> = variables_against(&options).collect();
        assert_eq!(variables, ["SBATCH_PARTITION", "SBATCH_TIMELIMIT"]);
    }

    #[test]
    fn job_names_are_plain() {
        for (text, expected) in
            [("prompts-1.v2", "prompts-1.v2"), ("my\n prömpts/%j", "my__pr_mpts__j")]
        {
            assert_eq!(job_name(text), expected);
        }
    }

    #[test]
    fn words_stay_readable() {
        for (word, expected) in [
            ("--max-new-tokens=8", "--max-new-tokens=8"),
            ("", "''"),
            ("~/$HOME", "'~/$HOME'"),
            ("it's a \"prömpt\"", r#"'it'\''s a "prömpt"'"#),
            ("--stop=\r\n\\", r"$'--stop=\015\n\\'"),
        ] {
            assert_eq!(shell_word(OsStr::new(word)), expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]
        /// bash gives back the very bytes, whatever they are; several words a start of bash.
        #[test]
        fn bash_reads_the_very_bytes(
            words in prop::collection::vec(prop::collection::vec(1u8..=255, 0..24), 1..40),
            texts in prop::collection::vec("[ -~\n\r'\"\\\\$`!é€]{0,12}", 1..40),
        ) {
            let words = words.into_iter().chain(texts.into_iter().map(String::into_bytes));
            let words: Vec<OsString> = words.map(OsString::from_vec).collect();
            let script = words.iter().map(|word| shell_word(word)).collect::<Vec<_>>().join(" ");
            prop_assert!(!script.contains(['\n', '\r']));
            let script = format!("printf '%s\\0' {script}");
            let out = Command::new("bash").args(["-c", &script]).output().expect("bash");
            let expected: Vec<u8> =
                words.iter().flat_map(|word| word.as_bytes().iter().copied().chain([0])).collect();
            prop_assert_eq!(out.stdout, expected);
        }
    }
}
