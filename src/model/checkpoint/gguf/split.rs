//! Models that lie in several GGUF files, as llama.cpp's `gguf-split` writes them:
//! `NAME-00001-of-00003.gguf` and so on, of which the first holds the metadata.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::{GgufFile, Metadata, shown};
use crate::model::checkpoint::StoredTensor;
use crate::{Error, Result};

/// The files that make up the model at `path`, in order: for any part of a split model all
/// of its parts, otherwise `path` alone (whether it exists is not looked at).
///
/// # Errors
/// An input error that names a missing part or an impossible file name.
pub fn split_paths(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str());
    let Some((stem, number, count)) = name.and_then(parse_name) else {
        return Ok(vec![path.to_owned()]);
    };
    if number == 0 || number > count {
        return Err(Error::input(format!(
            "{}: a split model has no part {number} of {count}",
            path.display()
        )));
    }
    (1..=count)
        .map(|i| {
            let part = path.with_file_name(format!("{stem}-{i:05}-of-{count:05}.gguf"));
            if part.exists() {
                return Ok(part);
            }
            Err(Error::input(format!(
                "{}: this part of the split model is missing; all {count} parts belong in one \
                 directory",
                part.display()
            )))
        })
        .collect()
}

/// Takes `NAME-00002-of-00003.gguf` apart into `NAME`, 2 and 3.
fn parse_name(name: &str) -> Option<(&str, u32, u32)> {
    fn number(digits: &str) -> Option<u32> {
        let right = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
        right.then(|| digits.parse().ok()).flatten()
    }
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    (!stem.is_empty()).then_some((stem, number(part)?, number(count)?))
}

/// A model, whatever the number of its files.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Metadata of the model (the first file's).
    pub metadata: Metadata,
    /// Each tensor with the index of its file.
    pub tensors: Vec<(usize, StoredTensor)>,
}

/// Puts the files of a model together: all its parts in order (see [`split_paths`]).
///
/// # Errors
/// Input errors: a part of a split model alone, parts in the wrong order or of another
/// split, tensors missing or twice.
pub fn merge(files: Vec<GgufFile>) -> Result<Merged> {
    let count = files.len();
    let total = files.first().and_then(|file| file.metadata.uint("split.tensors.count"));
    let mut merged = Merged { metadata: Metadata::default(), tensors: Vec::new() };
    for (i, file) in files.into_iter().enumerate() {
        check_part(&file.metadata, i, count)?;
        if i == 0 {
            merged.metadata = file.metadata;
        }
        merged.tensors.extend(file.tensors.into_iter().map(|tensor| (i, tensor)));
    }
    check_unique(&merged.tensors)?;
    let found = merged.tensors.len();
    match total {
        Some(total) if count > 1 && total != found as u64 => Err(Error::input(format!(
            "split.tensors.count is {total}, but the {count} parts hold {found} tensors"
        ))),
        _ => Ok(merged),
    }
}

/// Checks what a file says of its place among `count` files against its place `i`.
fn check_part(metadata: &Metadata, i: usize, count: usize) -> Result<()> {
    let parts = metadata.uint("split.count").unwrap_or(1).max(1);
    if parts != count as u64 {
        let advice = if count == 1 {
            ": give it the name that gguf-split gave it (…-00001-of-…), beside the other parts"
        } else {
            ""
        };
        return Err(Error::input(format!(
            "part {} of {count}: the file is one of {parts} parts (split.count){advice}",
            i + 1
        )));
    }
    // `split.no` counts from 0, file names from 1.
    let number = metadata.uint("split.no").unwrap_or(if count == 1 { 0 } else { u64::MAX });
    if count > 1 && number != i as u64 {
        return Err(Error::input(format!(
            "part {} of {count}: split.no says that the file is another part; was it renamed?",
            i + 1
        )));
    }
    Ok(())
}

fn check_unique(tensors: &[(usize, StoredTensor)]) -> Result<()> {
    let mut seen = HashMap::new();
    for (i, tensor) in tensors {
        if let Some(other) = seen.insert(tensor.name.as_str(), i) {
            return Err(Error::input(format!(
                "tensor {} stands in part {} and in part {}",
                shown(&tensor.name),
                other + 1,
                i + 1
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Value, read, testing::GgufBuilder};
    use super::*;

    fn part(no: u16, count: u16, tensors: &[&str], total: i32) -> GgufFile {
        let mut builder = GgufBuilder::new("llama")
            .raw("split.no", 2, no.to_le_bytes().to_vec())
            .raw("split.count", 2, count.to_le_bytes().to_vec())
            .raw("split.tensors.count", 5, total.to_le_bytes().to_vec());
        for name in tensors {
            builder = builder.f32s(name, &[2], &[1.0, 2.0]);
        }
        read(&builder.build()).unwrap()
    }

    #[test]
    fn names_of_parts() {
        assert_eq!(parse_name("m-00002-of-00003.gguf"), Some(("m", 2, 3)));
        assert_eq!(parse_name("a-of-b-00001-of-00001.gguf"), Some(("a-of-b", 1, 1)));
        for name in [
            "m.gguf",
            "m-2-of-3.gguf",
            "-00001-of-00002.gguf",
            "m-00001-of-00002.bin",
            "m-+0001-of-00002.gguf",
            "m-000001-of-000002.gguf",
            "00001-of-00002.gguf",
        ] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }

    #[test]
    fn any_part_leads_to_all_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = |i: u32| dir.path().join(format!("my-model-{i:05}-of-00003.gguf"));
        for i in [1, 2] {
            std::fs::write(path(i), "").unwrap();
        }
        let message = split_paths(&path(1)).unwrap_err().to_string();
        assert!(message.contains("my-model-00003-of-00003.gguf"), "{message}");
        std::fs::write(path(3), "").unwrap();
        for i in 1..=3 {
            assert_eq!(split_paths(&path(i)).unwrap(), [path(1), path(2), path(3)]);
        }
        for i in [0, 4] {
            let message = split_paths(&path(i)).unwrap_err().to_string();
            assert!(message.contains(&format!("no part {i} of 3")), "{message}");
        }
        let plain = dir.path().join("plain.gguf");
        assert_eq!(split_paths(&plain).unwrap(), [plain]);
    }

    #[test]
    fn parts_become_one_model() {
        let mut parts = vec![part(0, 2, &["a", "b"], 3), part(1, 2, &["c"], 3)];
        parts[1].metadata.0.insert("of.part".to_owned(), Value::Int(1));
        let merged = merge(parts).unwrap();
        let placed: Vec<_> = merged.tensors.iter().map(|(i, t)| (*i, t.name.as_str())).collect();
        assert_eq!(placed, [(0, "a"), (0, "b"), (1, "c")]);
        assert!(!merged.metadata.0.contains_key("of.part"));
        assert_eq!(merged.metadata.str("general.architecture"), Some("llama"));
    }

    #[test]
    fn a_file_that_is_no_part_stays_alone() {
        let file = read(&GgufBuilder::new("llama").f32s("a", &[1], &[1.0]).build()).unwrap();
        assert_eq!(merge(vec![file]).unwrap().tensors.len(), 1);
        assert_eq!(merge(vec![part(0, 1, &["a"], 1)]).unwrap().tensors.len(), 1);
        assert!(merge(Vec::new()).unwrap().tensors.is_empty());
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let refused = |parts: Vec<GgufFile>, why: &str| {
            let message = merge(parts).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        };
        refused(vec![part(0, 2, &["a"], 2)], "one of 2 parts");
        refused(vec![part(0, 2, &["a"], 2), part(1, 3, &["b"], 2)], "one of 3 parts");
        refused(vec![part(1, 2, &["a"], 2), part(0, 2, &["b"], 2)], "split.no");
        refused(
            vec![part(0, 2, &["a"], 2), part(1, 2, &["a"], 2)],
            "stands in part 1 and in part 2",
        );
        refused(vec![part(0, 2, &["a"], 9), part(1, 2, &["b"], 9)], "split.tensors.count is 9");
        let plain = read(&GgufBuilder::new("llama").f32s("z", &[1], &[1.0]).build()).unwrap();
        refused(vec![part(0, 2, &["a"], 2), plain], "one of 1 parts");
    }
}
