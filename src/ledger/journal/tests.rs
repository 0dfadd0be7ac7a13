//! What nights of work hang on: journals cut, damaged and read while they grow.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::frame::{Kind, encode, run_seed};
use super::*;

const RUN: &str = "run-key";

fn header(launch: LaunchId, rank: usize) -> JournalHeader {
    JournalHeader {
        run_key: RUN.to_owned(),
        launch,
        rank,
        host: format!("node{rank}"),
        slurm_job_id: None,
        started_unix_seconds: 1_700_000_000,
    }
}

fn id(index: u64, attempt: u16) -> RecordId {
    RecordId { index, key: index * 1000, attempt }
}

/// An action of a rank.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Act(Kind, u64, u16);

/// What an act's frame holds. Long enough to tell apart, and the same for all who do it.
fn payload(Act(kind, index, attempt): Act) -> Vec<u8> {
    match kind {
        Kind::Finished => format!("{{\"index\":{index},\"attempt\":{attempt}}}").into_bytes(),
        Kind::Failed => format!("{{\"error\":{index},\"attempt\":{attempt}}}").into_bytes(),
        Kind::Saved => vec![0xF5; 3 + index as usize % 5], // like the start of markers
        _ => Vec::new(),
    }
}

/// The bytes of a file, and where each frame begins (the header's first, the end's last).
fn file_bytes(header: &JournalHeader, acts: &[Act]) -> (Vec<u8>, Vec<usize>) {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = JournalWriter::create(dir.path(), header, SyncPolicy::default()).unwrap();
    let path = dir.path().join(file_name(header.launch, header.rank));
    let mut starts = vec![0];
    for &act in acts {
        starts.push(std::fs::metadata(&path).unwrap().len() as usize);
        let id = id(act.1, act.2);
        match act.0 {
            Kind::Started => writer.start(id),
            Kind::Saved => writer.save(id, &payload(act)),
            kind => {
                let line = [payload(act), b"\n".to_vec()].concat();
                writer.append(id, &line, kind == Kind::Failed)
            }
        }
        .unwrap();
        writer.flush(0.0).unwrap();
    }
    drop(writer);
    let bytes = std::fs::read(&path).unwrap();
    starts.push(bytes.len());
    (bytes, starts)
}

fn write(dir: &Path, launch: LaunchId, rank: usize, bytes: &[u8]) -> PathBuf {
    let path = dir.join(file_name(launch, rank));
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A run directory's journal directory.
fn journal_dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let journal = dir.path().join("journal");
    std::fs::create_dir(&journal).unwrap();
    (dir, journal)
}

fn scan(dir: &Path) -> Journals {
    let mut journals = Journals::new(dir, RUN);
    journals.refresh().unwrap();
    journals
}

fn lines(journals: &Journals) -> Vec<(u64, u64, bool, Vec<u8>)> {
    let mut lines = journals.lines().unwrap();
    let (mut all, mut line) = (Vec::new(), Vec::new());
    while let Some((index, key, is_error)) = lines.peek() {
        lines.read(&mut line).unwrap();
        all.push((index, key, is_error, line.clone()));
        lines.advance().unwrap();
    }
    all
}

/// All that a reader says, but for warnings.
#[derive(Debug, Clone, PartialEq, Default)]
struct Account {
    lines: Vec<(u64, u64, bool, Vec<u8>)>,
    done: Vec<u64>,
    failed: Vec<u64>,
    saved: Vec<(u64, Vec<u8>)>,
    attempts: Vec<u16>,
    in_work: BTreeMap<LaunchId, u64>,
    duplicates: u64,
}

/// Indices used in tests are below this.
const INDICES: u64 = 12;

fn account(journals: &Journals) -> Account {
    let saved = |index| Some((index, journals.saved(index)?.unwrap()));
    Account {
        lines: lines(journals),
        done: journals.done().iter().collect(),
        failed: journals.failed().iter().collect(),
        saved: (0..INDICES).filter_map(saved).collect(),
        attempts: (0..INDICES).map(|index| journals.attempt(index)).collect(),
        in_work: journals.in_work(),
        duplicates: journals.duplicates(),
    }
}

/// What these frames, in these files, say: the same in plain words.
fn expected(files: &[(LaunchId, Vec<Act>)]) -> Account {
    let mut ends = BTreeMap::<u64, BTreeMap<u16, Kind>>::new();
    let mut saved = BTreeMap::<u64, (u16, Vec<u8>)>::new();
    let mut account = Account::default();
    for (launch, acts) in files {
        for (place, &act) in acts.iter().enumerate() {
            let Act(kind, index, attempt) = act;
            let goes_on =
                |later: &&Act| later.0 != Kind::Started && (later.1, later.2) == (index, attempt);
            let again = |later: &&Act| **later == act;
            match kind {
                Kind::Started
                    if !acts[place + 1..].iter().any(|later| goes_on(&later) || again(&later)) =>
                {
                    *account.in_work.entry(*launch).or_default() += 1;
                }
                Kind::Finished | Kind::Failed => {
                    let attempts = ends.entry(index).or_default();
                    account.duplicates += u64::from(attempts.contains_key(&attempt));
                    let end = attempts.entry(attempt).or_insert(kind);
                    *end = if kind == Kind::Finished { kind } else { *end };
                }
                Kind::Saved => {
                    let new = (attempt, payload(act));
                    let newest = saved.entry(index).or_insert(new.clone());
                    *newest = new.max(newest.clone());
                }
                _ => {}
            }
        }
    }
    for (&index, attempts) in &ends {
        let (&attempt, &kind) = attempts.last_key_value().unwrap();
        let is_error = kind == Kind::Failed;
        let line = [payload(Act(kind, index, attempt)), b"\n".to_vec()].concat();
        account.lines.push((index, index * 1000, is_error, line));
        account.done.push(index);
        account.failed.extend(is_error.then_some(index));
    }
    let last = |index: u64| ends.get(&index).map(|attempts| *attempts.last_key_value().unwrap().0);
    account.attempts = (0..INDICES).map(|index| last(index).unwrap_or(0)).collect();
    saved.retain(|&index, saved| last(index).is_none_or(|attempt| saved.0 > attempt));
    account.saved = saved.into_iter().map(|(index, saved)| (index, saved.1)).collect();
    account
}

/// Three frames of each kind and more: done at once, failed, saved, saved and done, left.
fn sample() -> Vec<Act> {
    use Kind::{Failed, Finished, Saved, Started};
    vec![
        Act(Started, 0, 0),
        Act(Started, 1, 0),
        Act(Finished, 1, 0),
        Act(Failed, 2, 0),
        Act(Saved, 3, 0),
        Act(Saved, 4, 0),
        Act(Finished, 4, 0),
        Act(Failed, 5, 1),
        Act(Started, 6, 0),
        Act(Saved, 6, 0),
        Act(Failed, 7, 0),
        Act(Finished, 8, 0),
    ]
}

#[test]
fn what_ranks_of_several_launches_wrote_is_found_in_index_order() {
    use Kind::{Failed, Finished, Saved, Started};
    let (_run, dir) = journal_dir();
    let files = [
        (1, vec![Act(Started, 4, 0), Act(Finished, 4, 0), Act(Failed, 0, 0), Act(Saved, 2, 0)]),
        (1, vec![Act(Started, 3, 0), Act(Failed, 1, 0), Act(Started, 6, 0)]),
        (2, vec![Act(Finished, 0, 1), Act(Failed, 1, 1), Act(Finished, 2, 0), Act(Finished, 4, 0)]),
    ];
    for (rank, (launch, acts)) in files.iter().enumerate() {
        write(&dir, *launch, rank, &file_bytes(&header(*launch, rank), acts).0);
    }
    std::fs::write(dir.join("notes.txt"), "not a journal").unwrap();
    let mut journals = scan(&dir);
    let found = account(&journals);
    assert_eq!(found, expected(&files));
    let indices: Vec<_> = found.lines.iter().map(|line| (line.0, line.2)).collect();
    assert_eq!(indices, [(0, false), (1, true), (2, false), (4, false)]);
    assert_eq!(found.in_work, BTreeMap::from([(1, 2)]));
    assert_eq!(found.duplicates, 1);
    assert_eq!(journals.take_warnings(), Vec::<String>::new());
    assert_eq!(journals.torn_tails(), []);
    let launches = journals.launches();
    assert_eq!(launches[&1].header, Some(header(1, 0)));
    let counts = |launch| {
        let LaunchCounts { ranks, finished, failed, saved, .. } = launches[&launch];
        (ranks, finished, failed, saved)
    };
    assert_eq!((counts(1), counts(2)), ((2, 1, 2, 1), (1, 3, 1, 0)));
    let bytes = |path: PathBuf| std::fs::metadata(path).unwrap().len();
    assert_eq!(launches[&2].bytes, bytes(dir.join("00002-00002.farm")));
}

/// A retry can turn a failed record into a good one, and the other way round.
#[test]
fn the_highest_attempt_decides_whatever_order_it_is_read_in() {
    use Kind::{Failed, Finished, Saved};
    for (acts, failed, attempt, saved) in [
        (vec![Act(Failed, 1, 0), Act(Finished, 1, 1)], false, 1, false),
        (vec![Act(Finished, 1, 2), Act(Failed, 1, 0)], false, 2, false),
        (vec![Act(Finished, 1, 0), Act(Failed, 1, 3), Act(Finished, 1, 1)], true, 3, false),
        (vec![Act(Failed, 1, 0), Act(Saved, 1, 1)], true, 0, true),
        (vec![Act(Saved, 1, 1), Act(Failed, 1, 0)], true, 0, true),
        (vec![Act(Saved, 1, 1), Act(Failed, 1, 1), Act(Saved, 1, 0)], true, 1, false),
    ] {
        let (_run, dir) = journal_dir();
        write(&dir, 1, 0, &file_bytes(&header(1, 0), &acts).0);
        let journals = scan(&dir);
        assert_eq!(account(&journals), expected(&[(1, acts)]));
        assert_eq!((journals.failed().contains(1), journals.attempt(1)), (failed, attempt));
        assert_eq!(journals.saved(1).is_some(), saved);
        assert_eq!((journals.duplicates(), lines(&journals).len()), (0, 1));
    }
}

/// Several launches may have gone on with one record.
#[test]
fn the_longest_saved_generation_of_the_highest_attempt_is_gone_on_with() {
    for (saved, newest) in [
        (vec![(1, 0, "ab"), (1, 0, "abc"), (2, 0, "a")], "abc"),
        (vec![(3, 0, "abc"), (2, 0, "abcd"), (1, 0, "ab")], "abcd"),
        (vec![(1, 1, "a"), (2, 0, "ab"), (3, 0, "abc")], "a"),
    ] {
        let (_run, dir) = journal_dir();
        for (rank, (launch, attempt, generation)) in saved.into_iter().enumerate() {
            let header = header(launch, rank);
            let mut writer = JournalWriter::create(&dir, &header, SyncPolicy::default()).unwrap();
            writer.save(id(1, attempt), generation.as_bytes()).unwrap();
        }
        let journals = scan(&dir);
        assert_eq!(journals.saved(1).unwrap().unwrap(), newest.as_bytes());
        assert_eq!(journals.saved_records(), 1);
    }
}

/// A kill at any byte: the whole frames count, nothing is called damage, the next launch's
/// file goes on, and when the rest of the bytes comes it counts too.
#[test]
fn a_file_cut_at_any_byte_keeps_its_whole_frames() {
    let (_run, dir) = journal_dir();
    let acts = sample();
    let (bytes, starts) = file_bytes(&header(1, 0), &acts);
    let next = (2, vec![Act(Kind::Finished, 9, 0), Act(Kind::Finished, 0, 0)]);
    write(&dir, 2, 0, &file_bytes(&header(2, 0), &next.1).0);
    let whole = expected(&[(1, acts.clone()), next.clone()]);
    for cut in 0..bytes.len() {
        write(&dir, 1, 0, &bytes[..cut]);
        let frames = starts.iter().filter(|&&start| start <= cut).count() - 1;
        let kept = acts[..frames.saturating_sub(1)].to_vec();
        let mut journals = scan(&dir);
        assert_eq!(account(&journals), expected(&[(1, kept), next.clone()]), "cut {cut}");
        let tail: Vec<_> = journals
            .torn_tails()
            .iter()
            .map(|tail| (tail.launch, tail.offset, tail.bytes))
            .collect();
        let torn = (1, starts[frames] as u64, (cut - starts[frames]) as u64);
        assert_eq!(tail, if torn.2 > 0 { vec![torn] } else { vec![] }, "cut {cut}");
        write(&dir, 1, 0, &bytes);
        journals.refresh().unwrap();
        assert_eq!(account(&journals), whole, "cut {cut}");
        assert_eq!(journals.take_warnings(), Vec::<String>::new(), "cut {cut}");
        assert_eq!(journals.torn_tails(), [], "cut {cut}");
    }
}

/// One flipped bit anywhere: what its frame said is missing and reported (with the record,
/// where the head is whole), and all else is as it was.
#[test]
fn every_flipped_bit_is_found_and_costs_one_frame() {
    let (_run, dir) = journal_dir();
    let acts = sample();
    let (bytes, starts) = file_bytes(&header(1, 0), &acts);
    let path = write(&dir, 1, 0, &bytes);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for bit in 0..bytes.len() * 8 {
        let (byte, mask) = (bit / 8, 1 << (bit % 8));
        file.write_all_at(&[bytes[byte] ^ mask], byte as u64).unwrap();
        let mut journals = scan(&dir);
        let hit = starts.iter().filter(|&&start| start <= byte).count() - 1;
        let mut kept = acts.clone();
        let lost = (hit > 0).then(|| kept.remove(hit - 1));
        assert_eq!(account(&journals), expected(&[(1, kept)]), "bit {bit}");
        let mut said = journals.take_warnings();
        said.extend(journals.torn_tails().iter().map(|tail| tail.to_string()));
        let [said] = &said[..] else { panic!("bit {bit}: {said:?}") };
        assert!(said.contains(path.to_str().unwrap()), "bit {bit}: {said}");
        if let Some(Act(_, index, _)) = lost {
            assert!(said.contains(&format!("byte {} ", starts[hit])), "bit {bit}: {said}");
            let head_is_whole = byte >= starts[hit] + 32;
            let names = said.contains(&format!("record {index}"));
            assert_eq!(names, head_is_whole, "bit {bit}: {said}");
        }
        file.write_all_at(&bytes[byte..=byte], byte as u64).unwrap();
    }
}

#[test]
fn files_of_other_runs_and_formats_are_named_and_passed_over() {
    let (_run, dir) = journal_dir();
    let acts = [Act(Kind::Finished, 1, 0)];
    let foreign = JournalHeader { run_key: "other".to_owned(), ..header(1, 0) };
    let (foreign, starts) = file_bytes(&foreign, &acts);
    write(&dir, 1, 0, &foreign);
    // With its header damaged, it is still known by its checksums.
    let mut damaged = foreign.clone();
    damaged[starts[1] - 1] ^= 1;
    write(&dir, 1, 1, &damaged);
    write(&dir, 1, 2, b"something else altogether, put here by mistake");
    let mut newer = Vec::new();
    let json = serde_json::to_vec(&header(1, 3)).unwrap();
    encode(0, Kind::Header, RecordId { index: 1, key: 3, attempt: 2 }, &json, &mut newer).unwrap();
    encode(run_seed(RUN), Kind::Finished, id(2, 0), b"{}", &mut newer).unwrap();
    write(&dir, 1, 3, &newer);
    write(&dir, 2, 0, &file_bytes(&header(2, 0), &acts).0);
    let mut journals = scan(&dir);
    assert_eq!(account(&journals), expected(&[(2, acts.to_vec())]));
    let warnings = journals.take_warnings();
    let parts = [
        "00000.farm: passed over: it is of another run (other)",
        "00001.farm: its beginning",
        "00002.farm: its beginning",
        "00003.farm: passed over: written by another version",
    ];
    assert_eq!(warnings.len(), parts.len(), "{warnings:?}");
    for (warning, part) in warnings.iter().zip(parts) {
        assert!(warning.contains(part), "{warning}");
    }
    journals.refresh().unwrap();
    assert_eq!(journals.take_warnings(), Vec::<String>::new(), "each is said once");
    assert_eq!(journals.launches().keys().copied().collect::<Vec<_>>(), [1, 2]);
}

/// A network file system may show zeros in the middle for bytes that are still to come.
#[test]
fn a_hole_that_fills_later_gives_its_records_back() {
    let (_run, dir) = journal_dir();
    let mut acts: Vec<_> = (0..6).map(|index| Act(Kind::Finished, index, 0)).collect();
    acts[1] = Act(Kind::Started, 4, 0); // seen after its end, it is no work left
    let (bytes, starts) = file_bytes(&header(1, 0), &acts);
    let mut holed = bytes.clone();
    holed[starts[2]..starts[5]].fill(0);
    write(&dir, 1, 0, &holed[..starts[6]]);
    let mut journals = scan(&dir);
    assert_eq!(account(&journals).done, [0, 4]);
    assert_eq!(journals.take_warnings().len(), 1);
    holed[starts[3]..starts[4]].copy_from_slice(&bytes[starts[3]..starts[4]]);
    write(&dir, 1, 0, &holed);
    journals.refresh().unwrap();
    assert_eq!(account(&journals).done, [0, 2, 4, 5]);
    write(&dir, 1, 0, &bytes);
    journals.refresh().unwrap();
    journals.refresh().unwrap();
    assert_eq!(account(&journals), expected(&[(1, acts)]));
    assert_eq!(journals.take_warnings(), Vec::<String>::new(), "said once");
}

#[test]
fn files_that_vanish_or_shrink_are_errors_that_name_them() {
    let (run, dir) = journal_dir();
    let acts = [Act(Kind::Finished, 1, 0), Act(Kind::Saved, 2, 0)];
    let (bytes, starts) = file_bytes(&header(1, 0), &acts);
    let path = write(&dir, 1, 0, &bytes);
    let mut journals = scan(&dir);
    let names =
        |error: crate::Error| assert!(error.message.contains("00001-00000.farm"), "{error}");
    let mut line = Vec::new();
    let mut changed = bytes.clone();
    changed[starts[1] + 34] ^= 4;
    changed[starts[2] + 34] ^= 4;
    for bytes in [&changed[..], &bytes[..starts[1]]] {
        std::fs::write(&path, bytes).unwrap();
        names(journals.lines().unwrap().read(&mut line).unwrap_err());
        names(journals.saved(2).unwrap().unwrap_err());
    }
    names(journals.refresh().unwrap_err());
    std::fs::remove_file(&path).unwrap();
    names(journals.lines().unwrap().read(&mut line).unwrap_err());
    names(journals.saved(2).unwrap().unwrap_err());
    names(journals.refresh().unwrap_err());
    // After the fault is gone, the same reader goes on.
    std::fs::write(&path, &bytes).unwrap();
    journals.refresh().unwrap();
    assert_eq!(account(&journals), expected(&[(1, acts.to_vec())]));
    drop(run);
    let error = journals.refresh().unwrap_err();
    assert!(error.message.contains(dir.to_str().unwrap()), "{error}");
    let mut lines = journals.lines().unwrap();
    lines.advance().unwrap();
    assert!(lines.peek().is_none() && lines.read(&mut line).is_err());
}

#[test]
fn a_finished_launch_is_read_once_more_and_then_let_be() {
    let (_run, dir) = journal_dir();
    let acts = [Act(Kind::Finished, 1, 0), Act(Kind::Finished, 2, 0)];
    let (bytes, starts) = file_bytes(&header(1, 0), &acts);
    let path = write(&dir, 1, 0, &bytes[..starts[2]]);
    let mut journals = scan(&dir);
    std::fs::write(&path, &bytes).unwrap();
    journals.finish_launch(1);
    journals.refresh().unwrap();
    assert_eq!(journals.done().len(), 2);
    std::fs::remove_file(&path).unwrap();
    journals.refresh().unwrap();
}

#[test]
fn names_of_files_are_read_as_they_are_written() {
    for (launch, rank, name) in [
        (0, 0, "00000-00000.farm"),
        (12, 999, "00012-00999.farm"),
        (123_456, 1, "123456-00001.farm"),
    ] {
        assert_eq!(file_name(launch, rank), name);
        assert_eq!(parse_file_name(name), Some((launch, rank)));
    }
    for name in ["", "0-0.farm", "00000-00000.farm~", "00001-.farm", "+0001-00000.farm", "x.jsonl"]
    {
        assert_eq!(parse_file_name(name), None, "{name}");
    }
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let kind = prop::sample::select(vec![Kind::Started, Kind::Finished, Kind::Failed, Kind::Saved]);
    let act = (kind, 0..INDICES, prop_oneof![4 => Just(0u16), 1 => 1u16..3]);
    prop::collection::vec(act.prop_map(|(kind, index, attempt)| Act(kind, index, attempt)), 0..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// However the bytes of several files, damaged ones too, are spread over refreshes.
    #[test]
    fn reading_in_steps_equals_reading_at_once(
        files in prop::collection::vec(acts(), 1..4),
        garbage in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<[u8; 9]>()), 0..3),
        steps in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..12),
        in_memory_max in prop_oneof![1usize..5, Just(1000)],
    ) {
        let (run, dir) = journal_dir();
        let launches: Vec<_> = (0..).map(|i| i / 2).zip(files.clone()).collect();
        let mut bytes: Vec<_> = (0..).zip(&launches)
            .map(|(rank, (launch, acts))| file_bytes(&header(*launch, rank), acts).0)
            .collect();
        for (file, at, garbage) in &garbage {
            let file = file.get_mut_of(&mut bytes);
            let at = at.index(file.len());
            let len = garbage.len().min(file.len() - at);
            file[at..at + len].copy_from_slice(&garbage[..len]);
        }
        let mut stepwise = Journals::with_entries_in_memory(&dir, RUN, in_memory_max);
        let mut warnings = Vec::new();
        let mut shown = vec![0; bytes.len()];
        let last = (0..bytes.len()).map(|file| (file, bytes[file].len()));
        let steps = steps.iter().map(|(file, to)| {
            let file = file.index(bytes.len());
            (file, to.index(bytes[file].len() + 1))
        });
        for (file, to) in steps.chain(last).collect::<Vec<_>>() {
            shown[file] = to.max(shown[file]);
            write(&dir, launches[file].0, file, &bytes[file][..shown[file]]);
            stepwise.refresh().unwrap();
            warnings.extend(stepwise.take_warnings());
        }
        let mut at_once = scan(&dir);
        prop_assert_eq!(account(&stepwise), account(&at_once));
        prop_assert_eq!(stepwise.torn_tails(), at_once.torn_tails());
        warnings.sort();
        let mut warnings_at_once = at_once.take_warnings();
        warnings_at_once.sort();
        prop_assert_eq!(warnings, warnings_at_once);
        prop_assert_eq!(stepwise.launches(), at_once.launches());
        if garbage.is_empty() {
            prop_assert_eq!(account(&at_once), expected(&launches));
        }
        let names = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let left: Vec<_> = std::fs::read_dir(run.path()).unwrap().map(names).collect();
        prop_assert_eq!(left, ["journal"], "the index has no name");
    }

    /// Two flipped bits or more: never a wrong line, and never a record from nothing.
    #[test]
    fn damage_never_gives_a_wrong_line(
        acts in acts(),
        bits in prop::collection::vec(any::<prop::sample::Index>(), 2..5),
    ) {
        let (_run, dir) = journal_dir();
        let (whole, starts) = file_bytes(&header(1, 0), &acts);
        let mut bytes = whole.clone();
        for bit in bits {
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        write(&dir, 1, 0, &bytes);
        let intact = |place: &usize| {
            let frame = starts[place + 1]..starts[place + 2];
            bytes[frame.clone()] == whole[frame]
        };
        let kept: Vec<_> = (0..acts.len()).filter(intact).map(|place| acts[place]).collect();
        let mut journals = scan(&dir);
        let all_whole = bytes == whole;
        prop_assert_eq!(account(&journals), expected(&[(1, kept)]));
        let reports = journals.take_warnings().len() + journals.torn_tails().len();
        prop_assert_eq!(reports == 0, all_whole);
    }
}

/// Chooses one of a slice to change.
trait GetMutOf {
    fn get_mut_of<'a, T>(&self, all: &'a mut [T]) -> &'a mut T;
}

impl GetMutOf for prop::sample::Index {
    fn get_mut_of<'a, T>(&self, all: &'a mut [T]) -> &'a mut T {
        let place = self.index(all.len());
        &mut all[place]
    }
}
