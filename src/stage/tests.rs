//! Staging over simulated nodes: a temporary directory stands for each node's memory.

use std::fs;
use std::path::Path;

use super::*;
use crate::comm::LocalComm;
use crate::model::checkpoint::QuantizedFile;

const CHUNK: usize = 1000;
/// Two shards and two small files.
const SHARD_BYTES: usize = 12_345;

fn model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let shard = |seed: usize| -> Vec<u8> {
        (0..SHARD_BYTES).map(|index| ((index * seed) >> 3) as u8).collect()
    };
    let index = r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#;
    fs::write(dir.path().join("m-1.safetensors"), shard(7)).unwrap();
    fs::write(dir.path().join("m-2.safetensors"), shard(11)).unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    dir
}

fn manifest(model: &Path) -> Result<Manifest> {
    Manifest::read(&ModelPaths::of(model))
}

fn nodes(count: usize) -> Vec<tempfile::TempDir> {
    (0..count).map(|_| tempfile::tempdir().unwrap()).collect()
}

/// Runs `body` with what staging gave each rank, two ranks a node, before it is dropped.
fn staged<T: Send>(
    model: &Path,
    nodes: &[tempfile::TempDir],
    change: impl Fn(usize, &mut StageOptions) + Sync,
    body: impl Fn(&Topology, Result<Staged>) -> T + Sync,
) -> Vec<T> {
    LocalComm::run_with_nodes(nodes.len() * 2, 2, |world| {
        let topology = Topology::new(world, 1).unwrap();
        let mut options =
            StageOptions::new(ModelPaths::of(model), nodes[topology.node_index].path());
        options.chunk_bytes = CHUNK;
        change(topology.node_index, &mut options);
        body(&topology, stage(&topology, &options))
    })
}

fn keep(_: usize, options: &mut StageOptions) {
    options.keep = true;
}

/// Stages and keeps; returns the report and where each node's copy is.
fn stage_and_keep(model: &Path, nodes: &[tempfile::TempDir]) -> (StageReport, Vec<PathBuf>) {
    let all = staged(model, nodes, keep, |_, staged| {
        let staged = staged.unwrap();
        assert_same_files(model, &staged.model_path);
        (staged.report.clone(), staged.model_path.clone())
    });
    let paths = all.iter().step_by(2).map(|(_, path)| path.clone()).collect();
    (all[0].0.clone(), paths)
}

fn assert_same_files(model: &Path, copy: &Path) {
    for file in manifest(model).unwrap().files {
        assert!(
            fs::read(model.join(&file.path)).unwrap() == fs::read(copy.join(&file.path)).unwrap(),
            "{} differs",
            file.path
        );
    }
}

fn is_empty(node: &tempfile::TempDir) -> bool {
    fs::read_dir(node.path())
        .unwrap()
        .all(|cache| fs::read_dir(cache.unwrap().path()).unwrap().next().is_none())
}

fn flip_byte(path: &Path, at: usize) {
    let mut data = fs::read(path).unwrap();
    data[at] ^= 1;
    fs::write(path, data).unwrap();
}

#[test]
fn the_model_is_read_once_and_on_every_node_until_the_end() {
    for count in [1, 2, 4] {
        let (model, nodes) = (model(), nodes(count));
        let reports = staged(
            model.path(),
            &nodes,
            |_, _| {},
            |topology, staged| {
                let staged = staged.unwrap();
                assert!(staged.model_path.starts_with(nodes[topology.node_index].path()));
                assert_same_files(model.path(), &staged.model_path);
                let report = staged.report.clone();
                staged.finish(topology);
                report
            },
        );
        let bytes = manifest(model.path()).unwrap().bytes();
        assert_eq!(reports[0].bytes_read_source, bytes);
        assert_eq!(reports[0].bytes_staged, bytes * count as u64);
        assert!(reports.iter().all(|report| *report == reports[0]));
        assert!(nodes.iter().all(is_empty), "something was left staged");
    }
}

#[test]
fn a_second_run_reads_nothing_and_new_nodes_are_seeded_by_a_warm_one() {
    let (model, mut nodes) = (model(), nodes(2));
    let bytes = stage_and_keep(model.path(), &nodes).0.model_bytes;
    let (again, _) = stage_and_keep(model.path(), &nodes);
    assert!(again.reused);
    assert_eq!((again.bytes_read_source, again.bytes_reused), (0, 2 * bytes));
    // A cold node at the place of node 0.
    nodes.insert(0, tempfile::tempdir().unwrap());
    let (seeded, _) = stage_and_keep(model.path(), &nodes);
    assert_eq!((seeded.bytes_read_source, seeded.bytes_staged), (0, bytes));
}

#[test]
fn a_flipped_byte_is_found_and_only_its_chunk_is_sent_again() {
    let (model, nodes) = (model(), nodes(2));
    let (_, copies) = stage_and_keep(model.path(), &nodes);
    flip_byte(&copies[1].join("m-1.safetensors"), 5 * CHUNK + 3);
    let (mended, _) = stage_and_keep(model.path(), &nodes);
    assert_eq!((mended.bytes_read_source, mended.bytes_staged), (0, CHUNK as u64));
    // On all nodes the same chunk: only the model itself has it.
    for copy in &copies {
        flip_byte(&copy.join("m-2.safetensors"), 0);
    }
    let (mended, _) = stage_and_keep(model.path(), &nodes);
    assert_eq!((mended.bytes_read_source, mended.bytes_staged), (CHUNK as u64, 2 * CHUNK as u64));
}

#[test]
fn a_copy_without_a_sound_record_or_with_a_file_cut_short_is_replaced() {
    let (model, nodes) = (model(), nodes(2));
    let (first, copies) = stage_and_keep(model.path(), &nodes);
    let record = copies[0].join("manifest.json");
    let middle = fs::read(&record).unwrap().len() / 2;
    flip_byte(&record, middle);
    fs::write(copies[1].join("m-1.safetensors"), "short").unwrap();
    let (again, _) = stage_and_keep(model.path(), &nodes);
    assert_eq!(again.bytes_staged, first.bytes_staged);
    assert_eq!(again.bytes_read_source, first.model_bytes);
}

#[test]
fn what_a_killed_job_left_is_neither_trusted_nor_left() {
    let (model, nodes) = (model(), nodes(1));
    let cache = cache::open_cache(nodes[0].path()).unwrap();
    let name = manifest(model.path()).unwrap().copy_name();
    for left in
        [format!("{name}.partial"), "other-model.partial".to_owned(), "other-model".to_owned()]
    {
        fs::create_dir(cache.join(&left)).unwrap();
        fs::write(cache.join(&left).join("config.json"), "not the model's").unwrap();
    }
    fs::write(cache.join("other-model.lock"), "").unwrap();
    staged(
        model.path(),
        &nodes,
        |_, _| {},
        |topology, staged| {
            let staged = staged.unwrap();
            assert_same_files(model.path(), &staged.model_path);
            staged.finish(topology);
        },
    );
    assert!(is_empty(&nodes[0]));
}

#[test]
fn two_jobs_on_the_same_nodes_share_one_copy() {
    let (model, nodes) = (model(), nodes(2));
    let reports = std::thread::scope(|scope| {
        let job = || {
            let run = |topology: &Topology, staged: Result<Staged>| {
                let staged = staged.unwrap();
                assert_same_files(model.path(), &staged.model_path);
                let report = staged.report.clone();
                staged.finish(topology);
                report
            };
            staged(model.path(), &nodes, |_, _| {}, run)[0].clone()
        };
        let jobs: Vec<_> = (0..3).map(|_| scope.spawn(job)).collect();
        jobs.into_iter().map(|job| job.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(reports.iter().any(|report| !report.reused));
    assert!(nodes.iter().all(is_empty), "something was left staged");
}

#[test]
fn a_model_cut_short_while_it_is_read_stops_all_with_its_name() {
    let (model, nodes) = (model(), nodes(3));
    // The manifest is of the whole file; the reader finds less.
    let manifest = manifest(model.path()).unwrap();
    fs::write(model.path().join("m-2.safetensors"), vec![0; CHUNK * 3 + 1]).unwrap();
    let errors = LocalComm::run_with_nodes(3, 1, |world| {
        let mut options =
            StageOptions::new(ModelPaths::of(model.path()), nodes[world.rank()].path());
        options.chunk_bytes = CHUNK;
        let (manifest, chunks) = (&manifest, &plan::chunks(&manifest.files, CHUNK)[..]);
        let (leaders, options) = (&*world, &options);
        let leader = Leader { leaders, world: leaders, manifest, chunks, options };
        let prepared = leader.prepare().unwrap();
        leader.carry_out(prepared, Ok(Made::default())).unwrap_err().message
    });
    assert!(errors[0].contains("rank 0 on node0") && errors[0].contains("m-2.safetensors"));
    assert!(errors.iter().all(|error| *error == errors[0]));
    assert!(nodes.iter().all(is_empty), "something was left staged");
}

#[test]
fn a_missing_model_is_one_input_error_for_all() {
    let errors =
        staged(Path::new("/no/such/model"), &nodes(2), |_, _| {}, |_, staged| staged.unwrap_err());
    assert_eq!(errors[0].kind, crate::ErrorKind::Input);
    assert!(!errors[0].message.contains("rank"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]));
}

/// A stage directory that cannot be made: a file is in its place.
fn no_stage_dir_on_node_1(node: usize, options: &mut StageOptions) {
    if node == 1 {
        options.stage_dir = options.sources.model.join("config.json/below-a-file");
    }
}

#[test]
fn a_node_that_cannot_take_a_copy_is_an_error_or_reads_in_place() {
    let (model, nodes) = (model(), nodes(3));
    let errors =
        staged(model.path(), &nodes, no_stage_dir_on_node_1, |_, staged| staged.unwrap_err());
    assert!(errors[5].message.contains("node1") && errors[5].message.contains("--stage-fallback"));
    let paths = staged(
        model.path(),
        &nodes,
        |node, options| {
            options.fallback = StageFallback::InPlace;
            no_stage_dir_on_node_1(node, options);
        },
        |topology, staged| {
            let staged = staged.unwrap();
            assert!(staged.report.in_place.as_ref().unwrap().contains("node1"));
            let in_place = staged.model_path == model.path();
            staged.finish(topology);
            in_place
        },
    );
    assert_eq!(paths, [false, false, true, true, false, false]);
}

#[test]
fn no_stage_reads_the_model_where_it_is() {
    let (model, nodes) = (model(), nodes(1));
    staged(
        model.path(),
        &nodes,
        |_, options| options.no_stage = true,
        |_, staged| {
            let staged = staged.unwrap();
            assert_eq!(staged.model_path, model.path());
            assert_eq!(staged.report.bytes_staged, 0);
        },
    );
    assert!(is_empty(&nodes[0]));
}

/// A tokenizer above the model: the copy has it, and every rank is told where.
#[test]
fn what_lies_elsewhere_comes_into_the_copy() {
    let (model, nodes) = (model(), nodes(2));
    let extra = tempfile::tempdir().unwrap();
    fs::write(extra.path().join("tokenizer.model"), "pieces").unwrap();
    let sources = ModelPaths {
        model: model.path().into(),
        tokenizer: Some(extra.path().join("tokenizer.model")),
    };
    for no_stage in [false, true] {
        let with_all = |_: usize, options: &mut StageOptions| {
            (options.sources, options.no_stage) = (sources.clone(), no_stage);
        };
        staged(model.path(), &nodes, with_all, |topology, staged| {
            let staged = staged.unwrap();
            let tokenizer = staged.tokenizer_path.clone().unwrap();
            assert_eq!(fs::read(&tokenizer).unwrap(), b"pieces");
            let below = tokenizer.starts_with(nodes[topology.node_index].path());
            assert_eq!(below, !no_stage, "{}", tokenizer.display());
            staged.finish(topology);
        });
        assert!(nodes.iter().all(is_empty));
    }
}

/// Rows of whole blocks.
fn floats() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

fn to_q4_k(_: usize, options: &mut StageOptions) {
    (options.keep, options.quantize) = (true, Some(QuantType::Q4_K));
    options.chunk_bytes = 32 << 10;
}

/// Stages it quantized and keeps it; returns the report and where each node's weights are.
fn stage_quantized(model: &Path, nodes: &[tempfile::TempDir]) -> (StageReport, Vec<PathBuf>) {
    let all = staged(model, nodes, to_q4_k, |_, staged| {
        let staged = staged.unwrap();
        (staged.report.clone(), staged.model_path.join("model.safetensors"))
    });
    let paths = all.iter().step_by(2).map(|(_, path)| path.clone()).collect();
    (all[0].0.clone(), paths)
}

#[test]
fn weights_quantized_on_their_way_are_the_same_on_any_number_of_nodes() {
    let model = floats();
    let file = QuantizedFile::open(&model, QuantType::Q4_K).unwrap().unwrap();
    let mut whole = vec![0; file.bytes() as usize];
    file.read_at(0, &mut whole).unwrap();
    let plain = manifest(&model).unwrap().bytes();
    for count in [1, 2, 4] {
        let nodes = nodes(count);
        let (report, copies) = stage_quantized(&model, &nodes);
        assert!(copies.iter().all(|copy| fs::read(copy).unwrap() == whole));
        assert_eq!(report.quantized.as_deref(), Some("q4_k"));
        assert!(report.model_bytes * 3 < plain, "{} of {plain}", report.model_bytes);
        assert_eq!(report.bytes_staged, report.model_bytes * count as u64);
        // Rows that are cut by a chunk's end are read for both.
        let read = report.bytes_read_source;
        assert!(plain <= read && read <= plain + plain / 5, "{read} of {plain}");
        let (again, _) = stage_quantized(&model, &nodes);
        assert_eq!((again.reused, again.bytes_read_source), (true, 0));
        assert_eq!(again.quantized.as_deref(), Some("q4_k"));
    }
}

#[test]
fn damaged_quantized_weights_are_fetched_or_made_again() {
    let (model, mut nodes) = (floats(), nodes(2));
    let (first, copies) = stage_quantized(&model, &nodes);
    let whole = fs::read(&copies[0]).unwrap();
    flip_byte(&copies[1], 700_000);
    let (fetched, _) = stage_quantized(&model, &nodes);
    assert_eq!((fetched.bytes_read_source, fetched.bytes_staged), (0, 32 << 10));
    for copy in &copies {
        flip_byte(copy, 700_000);
    }
    let (made, _) = stage_quantized(&model, &nodes);
    assert!(made.bytes_read_source < first.bytes_read_source / 10);
    assert_eq!(made.bytes_staged, 2 * (32 << 10));
    assert!(copies.iter().all(|copy| fs::read(copy).unwrap() == whole));
    // Cold nodes around a warm one read nothing.
    nodes.insert(0, tempfile::tempdir().unwrap());
    let (seeded, copies) = stage_quantized(&model, &nodes);
    assert_eq!((seeded.bytes_read_source, seeded.bytes_staged), (0, first.model_bytes));
    assert!(copies.iter().all(|copy| fs::read(copy).unwrap() == whole));
}

/// Values that cannot be quantized, in the middle of the work of several ranks.
#[test]
fn a_failure_while_quantizing_stops_all_and_leaves_nothing() {
    let (model, nodes) = (tempfile::tempdir().unwrap(), nodes(2));
    for entry in fs::read_dir(floats()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.path().join(path.file_name().unwrap())).unwrap();
    }
    let weights = model.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 4 * 2;
    bytes[middle..middle + 64].fill(0xff);
    fs::write(&weights, bytes).unwrap();
    let drop_copy = |node: usize, options: &mut StageOptions| {
        to_q4_k(node, options);
        options.keep = false;
    };
    let errors = staged(model.path(), &nodes, drop_copy, |_, staged| staged.unwrap_err().message);
    assert!(errors[0].contains("tensor model.layers") && errors[0].contains("not finite"));
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    assert!(nodes.iter().all(is_empty), "something was left staged");
}

#[test]
fn what_has_nothing_to_quantize_is_staged_as_it_is() {
    let gguf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/llama_quantized_q4_k_m.gguf");
    let (plain, asked) = (manifest(&gguf).unwrap(), manifest(&gguf).unwrap());
    assert_eq!(asked.quantized(QuantType::Q8_0).unwrap(), plain);
    let keys = [QuantType::Q8_0, QuantType::Q4_K]
        .map(|quant| manifest(&floats()).unwrap().quantized(quant).unwrap().copy_name());
    assert!(keys[0].starts_with("tiny-q8_0-") && keys[1].starts_with("tiny-q4_k-"), "{keys:?}");
}
