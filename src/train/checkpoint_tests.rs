use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::philox::philox4x32;

const KEEP_ALL: Keep = Keep { last: 100, also: None };

/// Values that tell steps apart, among them those that are easily lost.
fn values(step: u64) -> Vec<f32> {
    vec![step as f32, -0.0, f32::MIN_POSITIVE / 8.0, f32::NAN, f32::NEG_INFINITY, 1.0 / 3.0]
}

fn state(step: u64) -> Value {
    json!({"cursor": [step, u64::MAX], "loss": 1.0 / 3.0, "best": null, "seed": "ä\n"})
}

fn save_step(folder: &Path, step: u64, keep: Keep) -> Result<PathBuf> {
    save_until(folder, step, keep, usize::MAX).0
}

/// Saves, but is killed after `steps` steps; also how many were done.
fn save_until(folder: &Path, step: u64, keep: Keep, steps: usize) -> (Result<PathBuf>, usize) {
    let values = values(step);
    let tensors = [
        NamedTensor { name: "q.m", shape: &[2, 3], values: &values },
        NamedTensor { name: "empty", shape: &[0], values: &[] },
    ];
    let checkpoint = Checkpoint { step, tensors: &tensors, state: &state(step) };
    let extra = |dir: &Path| {
        fs::create_dir(dir.join("more")).map_err(|e| Error::io(dir, e))?;
        fs::write(dir.join("more/adapter.txt"), format!("{step}")).map_err(|e| Error::io(dir, e))
    };
    let mut done = 0;
    let mut between = || {
        done += 1;
        if done > steps { Err(Error::fault("killed")) } else { Ok(()) }
    };
    let outcome = save_in_steps(folder, &checkpoint, extra, keep, &mut between);
    (outcome, done)
}

/// The step of the latest checkpoint, once its content is what was saved.
fn latest_step(folder: &Path) -> Option<u64> {
    let loaded = latest(folder).unwrap()?;
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&loaded.tensors["q.m"].values), bits(&values(loaded.step)));
    assert_eq!(loaded.tensors["q.m"].shape, [2, 3]);
    assert_eq!(loaded.tensors["empty"], LoadedTensor { shape: vec![0], values: vec![] });
    assert_eq!(loaded.state, state(loaded.step));
    let adapter = fs::read_to_string(loaded.dir.join("more/adapter.txt")).unwrap();
    assert_eq!(adapter, loaded.step.to_string());
    Some(loaded.step)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = entries(folder).unwrap().into_iter().map(|e| e.1).collect();
    names.sort();
    names
}

fn with_steps(steps: &[u64]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for &step in steps {
        save_step(folder.path(), step, KEEP_ALL).unwrap();
    }
    folder
}

#[test]
fn what_was_saved_comes_back_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let below = folder.path().join("not/yet");
    assert_eq!(latest(&below).unwrap(), None);
    let dir = save_step(&below, 12, KEEP_ALL).unwrap();
    assert_eq!(dir, below.join("checkpoint-12"));
    assert_eq!(names(&dir), ["checkpoint.json", "more", "optimizer.safetensors"]);
    assert_eq!(latest_step(&below), Some(12));
}

/// A resumed run ends with the same files, byte for byte.
#[test]
fn the_same_content_gives_the_same_bytes() {
    let folders = [with_steps(&[5]), with_steps(&[5])];
    for name in [TENSORS_FILE, MANIFEST_FILE] {
        let [a, b] = folders.each_ref().map(|f| fs::read(f.path().join("checkpoint-5").join(name)));
        assert_eq!(a.unwrap(), b.unwrap());
    }
}

#[test]
fn the_newest_and_the_best_stay() {
    let folder = tempfile::tempdir().unwrap();
    for step in [2, 9, 10, 11] {
        save_step(folder.path(), step, Keep { last: 2, also: Some(2) }).unwrap();
    }
    assert_eq!(names(folder.path()), ["checkpoint-10", "checkpoint-11", "checkpoint-2"]);
    save_step(folder.path(), 12, Keep { last: 0, also: None }).unwrap();
    assert_eq!(names(folder.path()), ["checkpoint-12"]);
}

/// Other programs use the same names, and people put their own things there.
#[test]
fn only_what_farm_made_is_removed() {
    let folder = with_steps(&[4]);
    let at = |name: &str| folder.path().join(name);
    for dir in ["checkpoint-1", "checkpoint-best", "checkpoint-3.old", ".checkpoint-x.partial"] {
        fs::create_dir(at(dir)).unwrap();
        fs::write(at(dir).join("checkpoint.json"), "{\"step\": 1}").unwrap();
    }
    fs::write(at("checkpoint-2"), "a file").unwrap();
    let mut expected = names(folder.path());
    save_step(folder.path(), 5, Keep { last: 1, also: None }).unwrap();
    expected.retain(|name| name != "checkpoint-4");
    expected.push("checkpoint-5".into());
    expected.sort();
    assert_eq!(names(folder.path()), expected);
    assert_eq!(latest_step(folder.path()), Some(5));
}

/// Every file of a checkpoint, every kind of damage: the one before it is taken, and the
/// damaged one is left as it is.
#[test]
fn damage_at_any_place_is_seen() {
    for file in [TENSORS_FILE, MANIFEST_FILE, "more/adapter.txt"] {
        let folder = with_steps(&[1, 2]);
        let path = folder.path().join("checkpoint-2").join(file);
        let whole = fs::read(&path).unwrap();
        for i in 0..60u32 {
            let [place, bit, cut, _] = philox4x32([i, 0, 0, 0], [7, 7]);
            let place = place as usize % whole.len();
            let mut bytes = whole.clone();
            if cut % 3 == 0 {
                bytes.truncate(place);
            } else {
                bytes[place] ^= 1 << (bit % 8);
            }
            fs::write(&path, &bytes).unwrap();
            assert_eq!(latest_step(folder.path()), Some(1), "{file} {place} {i}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(latest_step(folder.path()), Some(1), "{file} is gone");
        let error = load(&folder.path().join("checkpoint-2")).unwrap_err();
        assert!(error.message.contains(file), "{error}");
        fs::write(&path, &whole).unwrap();
        assert_eq!(latest_step(folder.path()), Some(2));
    }
}

#[test]
fn a_checkpoint_under_another_name_does_not_count() {
    let folder = with_steps(&[1, 2]);
    fs::rename(folder.path().join("checkpoint-2"), folder.path().join("checkpoint-7")).unwrap();
    assert_eq!(latest_step(folder.path()), Some(1));
}

/// A run that went back over a damaged checkpoint reaches its step again.
#[test]
fn a_damaged_checkpoint_makes_room_but_stays() {
    let folder = with_steps(&[1, 2]);
    for times in 1..3 {
        fs::write(folder.path().join("checkpoint-2").join(TENSORS_FILE), "cut").unwrap();
        save_step(folder.path(), 2, KEEP_ALL).unwrap();
        assert_eq!(latest_step(folder.path()), Some(2));
        assert!(folder.path().join(format!("checkpoint-2.damaged-{times}")).is_dir());
    }
    assert_eq!(names(folder.path()).len(), 4);
}

/// The kill may come at any moment, while a checkpoint is new, or takes the place of one.
#[test]
fn a_kill_between_any_two_steps_leaves_a_loadable_state() {
    for (before, now) in [([1, 2], 3), ([2, 3], 3)] {
        let keep = Keep { last: 1, also: None };
        let all = save_until(with_steps(&before).path(), now, keep, usize::MAX).1;
        for steps in 0..all {
            let folder = with_steps(&before);
            let (outcome, done) = save_until(folder.path(), now, keep, steps);
            assert!(outcome.is_err() && done == steps + 1);
            let found = latest_step(folder.path());
            let old = before.last().copied();
            assert!(found == Some(now) || found == old, "{before:?} {steps}: {found:?}");
            // Another run goes on as if nothing had been.
            save_step(folder.path(), 4, keep).unwrap();
            assert_eq!(names(folder.path()), ["checkpoint-4"], "{before:?} {steps}");
            assert_eq!(latest_step(folder.path()), Some(4));
        }
    }
}

#[test]
fn tensors_that_cannot_be_saved_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let one = NamedTensor { name: "one", shape: &[1], values: &[1.0] };
    let short = NamedTensor { name: "short", shape: &[2, 3], values: &[1.0] };
    for (tensors, name) in [([one, one], "one"), ([one, short], "short")] {
        let checkpoint = Checkpoint { step: 1, tensors: &tensors, state: &Value::Null };
        let error = save(folder.path(), &checkpoint, |_| Ok(()), KEEP_ALL).unwrap_err();
        assert!(error.message.contains(name), "{error}");
        assert_eq!(latest(folder.path()).unwrap(), None);
    }
}
