//! Meta's form against Meta's published params.json, and against the model it was made of
//! (tests/golden/meta.py).

use std::path::PathBuf;

use super::super::torch;
use super::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn refused<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind, crate::ErrorKind::Input);
    for word in words {
        assert!(error.message.contains(word), "{word}: {error}");
    }
}

/// The folder's files, their tensors, and its params.json.
fn read(name: &str) -> (Vec<Vec<u8>>, Vec<Vec<StoredTensor>>, Value) {
    let dir = golden(name);
    let files: Vec<Vec<u8>> =
        paths(&dir).unwrap().unwrap().iter().map(|path| std::fs::read(path).unwrap()).collect();
    let tensors = files.iter().map(|bytes| torch::read(bytes).unwrap()).collect();
    let params = std::fs::read(dir.join("params.json")).unwrap();
    (files, tensors, serde_json::from_slice(&params).unwrap())
}

/// The merged tensor's 16-bit values, each written just once.
fn values(merged: &Merged, files: &[Vec<u8>]) -> Vec<[u8; 2]> {
    let (rows, cols) = match merged.shape[..] {
        [cols] => (1, cols),
        [rows, cols] => (rows, cols),
        _ => panic!("{:?}", merged.shape),
    };
    let mut out = vec![None; rows * cols];
    for piece in &merged.pieces {
        let (values, _) = files[piece.file][piece.offset..].as_chunks::<2>();
        let mut values = values.iter();
        for row in piece.rows.clone() {
            for col in piece.cols.clone() {
                assert!(out[row * cols + col].replace(*values.next().unwrap()).is_none());
            }
        }
    }
    out.into_iter().map(Option::unwrap).collect()
}

/// HF's name of Meta's tensor, and its heads where rows are in another order.
fn hf_name(name: &str) -> (String, Option<usize>) {
    let name = match name {
        "tok_embeddings.weight" => return ("model.embed_tokens.weight".into(), None),
        "output.weight" => return ("lm_head.weight".into(), None),
        other => other,
    };
    let heads = [("attention.wq", 8), ("attention.wk", 4)];
    let heads = heads.iter().find(|(part, _)| name.contains(part)).map(|(_, heads)| *heads);
    let name = [
        ("attention.w", "self_attn."),
        ("feed_forward.w", "mlp."),
        ("self_attn.q", "self_attn.q_proj"),
        ("self_attn.k", "self_attn.k_proj"),
        ("self_attn.v", "self_attn.v_proj"),
        ("self_attn.o", "self_attn.o_proj"),
        ("mlp.1", "mlp.gate_proj"),
        ("mlp.2", "mlp.down_proj"),
        ("mlp.3", "mlp.up_proj"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
    ]
    .iter()
    .fold(name.to_string(), |name, (from, to)| name.replace(from, to));
    (format!("model.{name}"), heads)
}

#[test]
fn one_two_four_and_eight_files_hold_the_model_they_were_cut_from() {
    let source = std::fs::read(golden("llama_bf16/model.safetensors")).unwrap();
    let source = safetensors::SafeTensors::deserialize(&source).unwrap();
    for count in [1, 2, 4, 8] {
        let (files, tensors, params) = read(&format!("meta_mp{count}"));
        assert_eq!(files.len(), count);
        let merged = merge(tensors, &params).unwrap();
        assert_eq!(merged.len(), source.len());
        for tensor in &merged {
            let (name, heads) = hf_name(&tensor.name);
            let want = source.tensor(&name).unwrap();
            assert_eq!(tensor.shape, want.shape(), "{name}");
            assert_eq!(tensor.dtype, StoredDtype::Bf16);
            let got = values(tensor, &files);
            let (want, _) = want.data().as_chunks::<2>();
            let Some(heads) = heads else {
                assert_eq!(got, want, "{name} of {count}");
                continue;
            };
            // Meta's row 2i + j of a head is HF's row i + j * half.
            let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
            let head = rows / heads;
            for row in 0..rows {
                let (first, within) = (row / head * head, row % head);
                let theirs = first + within / 2 + within % 2 * (head / 2);
                assert_eq!(
                    got[row * cols..][..cols],
                    want[theirs * cols..][..cols],
                    "{name} of {count}"
                );
            }
        }
    }
}

#[test]
fn the_config_is_that_of_the_model_it_was_made_of() {
    let theirs = std::fs::read(golden("llama_bf16/config.json")).unwrap();
    let theirs: Value = serde_json::from_slice(&theirs).unwrap();
    for count in [1, 2, 4, 8] {
        let (_, tensors, params) = read(&format!("meta_mp{count}"));
        let merged = merge(tensors, &params).unwrap();
        let shapes = |name: &str| merged.iter().find(|t| t.name == name).map(|t| t.shape.clone());
        let config = hf_config(&params, shapes).unwrap();
        for key in [
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "hidden_act",
        ] {
            assert_eq!(config[key], theirs[key], "{key}");
        }
        assert_eq!(config["head_dim"], 8);
    }
}

// ------------------------------------------------------------------------------------ files

#[test]
fn a_sequence_of_files_must_be_whole() {
    let dir = tempfile::tempdir().unwrap();
    let touch = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
    for other in ["consolidated.0.pth", "consolidated.000.pth", "consolidated.x.pth", "a.00.pth"] {
        touch(other);
    }
    assert_eq!(paths(dir.path()).unwrap(), None);
    touch("consolidated.00.pth");
    assert_eq!(paths(dir.path()).unwrap().unwrap(), [dir.path().join("consolidated.00.pth")]);
    touch("consolidated.02.pth");
    refused(paths(dir.path()), &["consolidated.01.pth: missing", "consolidated.02.pth"]);
    touch("consolidated.01.pth");
    refused(paths(dir.path()), &["3 files", "download complete"]);
    touch("consolidated.03.pth");
    assert_eq!(paths(dir.path()).unwrap().unwrap().len(), 4);
    touch("consolidated.18446744073709551615.pth");
    refused(paths(dir.path()), &["consolidated.04.pth: missing"]);
    refused(paths(&dir.path().join("none")), &["none"]);
}

// ------------------------------------------------------------------------------------ config

/// Shapes of a model with `w1` rows of the MLP and `vocab` rows of the embedding.
fn shaped(w1: usize, vocab: usize, tied: bool) -> impl Fn(&str) -> Option<Vec<usize>> {
    move |name| match name {
        "layers.0.feed_forward.w1.weight" => Some(vec![w1, 1]),
        "tok_embeddings.weight" => Some(vec![vocab, 1]),
        "output.weight" => (!tied).then(|| vec![vocab, 1]),
        _ => Some(vec![1]),
    }
}

#[test]
fn published_params_give_the_published_configs() {
    // As Meta published them; width of the MLP, context, base and scaling as in HF's config.json
    // of the same models.
    let cases = [
        // Llama 1 7B
        (
            json!({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                   "norm_eps": 1e-06, "vocab_size": -1}),
            (11008, 32000, 2048, 1e4, None),
        ),
        // Llama 1 65B
        (
            json!({"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80,
                   "norm_eps": 1e-05, "vocab_size": -1}),
            (22016, 32000, 2048, 1e4, None),
        ),
        // Llama 2 7B
        (
            json!({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                   "norm_eps": 1e-05, "vocab_size": -1}),
            (11008, 32000, 4096, 1e4, None),
        ),
        // Llama 2 70B
        (
            json!({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
                   "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}),
            (28672, 32000, 4096, 1e4, None),
        ),
        // CodeLlama 7B
        (
            json!({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256,
                   "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 1000000}),
            (11008, 32016, 16384, 1e6, None),
        ),
        // Llama 3 8B
        (
            json!({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
                   "vocab_size": 128256, "multiple_of": 1024, "ffn_dim_multiplier": 1.3,
                   "norm_eps": 1e-05, "rope_theta": 500000.0}),
            (14336, 128256, 8192, 5e5, None),
        ),
        // Llama 3.1 8B
        (
            json!({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
                   "vocab_size": 128256, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
                   "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": true}),
            (14336, 128256, 131072, 5e5, Some(8.0)),
        ),
        // Llama 3.2 1B
        (
            json!({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8,
                   "vocab_size": 128256, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
                   "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": true}),
            (8192, 128256, 131072, 5e5, Some(32.0)),
        ),
        // The same, its factor given.
        (
            json!({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8,
                   "vocab_size": 128256, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
                   "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": true,
                   "rope_scaling_factor": 16}),
            (8192, 128256, 131072, 5e5, Some(16.0)),
        ),
    ];
    for (params, (width, vocab, context, theta, factor)) in cases {
        let config = hf_config(&params, shaped(width, vocab, false)).unwrap();
        assert_eq!(config["intermediate_size"], width, "{params}");
        assert_eq!(config["vocab_size"], vocab, "{params}");
        assert_eq!(config["max_position_embeddings"], context, "{params}");
        assert_eq!(config["rope_theta"], theta, "{params}");
        assert_eq!(
            config["rope_scaling"].get("factor").and_then(Value::as_f64),
            factor,
            "{params}"
        );
        assert_eq!(config["tie_word_embeddings"], false);
        assert_eq!(config.get("eos_token_id").is_some(), vocab == LLAMA3_VOCAB);
        let kv_heads = params.get("n_kv_heads").unwrap_or(&params["n_heads"]);
        assert_eq!(config["num_key_value_heads"], *kv_heads);
    }
}

fn params() -> Value {
    json!({"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8,
           "norm_eps": 1e-5, "vocab_size": 10})
}

#[test]
fn a_missing_output_is_the_embedding() {
    let config = hf_config(&params(), shaped(48, 10, true)).unwrap();
    assert_eq!(config["tie_word_embeddings"], true);
}

#[test]
fn params_that_cannot_be_are_refused_by_key() {
    for (key, value, word) in [
        ("dim", json!(null), "dim is missing"),
        ("dim", json!(0), "dim is out of range"),
        ("dim", json!(-1), "dim is out of range"),
        ("dim", json!(1u64 << 62), "dim is out of range"),
        ("dim", json!("16"), "dim is out of range"),
        ("dim", json!(3), "do not fit together"),
        ("dim", json!(24), "the MLP's width"),
        ("n_heads", json!(0), "n_heads"),
        ("n_heads", json!(4.5), "n_heads"),
        ("n_kv_heads", json!(3), "do not fit together"),
        ("n_layers", json!([]), "n_layers"),
        ("vocab_size", json!(-2), "vocab_size"),
        ("vocab_size", json!(11), "vocab_size, but tok_embeddings.weight has 10 rows"),
        ("norm_eps", json!(-1.0), "norm_eps"),
        ("rope_theta", json!("1e4"), "rope_theta"),
        ("use_scaled_rope", json!(1), "use_scaled_rope"),
        ("ffn_dim_multiplier", json!(1e300), "ffn_dim_multiplier"),
        ("ffn_dim_multiplier", json!(1e12), "the MLP's width"),
        ("multiple_of", json!(0), "multiple_of"),
        ("hidden_dim", json!(49), "gives 49 for the MLP's width"),
        ("moe", json!({"num_experts": 8}), "moe is not supported"),
        ("moe_args", json!({}), "moe_args is not supported"),
        ("vision_chunk_size", json!(448), "vision_chunk_size"),
        ("quantization_args", json!({}), "quantization_args"),
        ("lora_args", json!({}), "lora_args"),
        ("sliding_window", json!(4096), "sliding_window"),
    ] {
        let mut params = params();
        params[key] = value;
        refused(hf_config(&params, shaped(48, 10, false)), &["params.json", word]);
    }
    for not_an_object in [json!(null), json!([1]), json!({"model": 1})] {
        refused(hf_config(&not_an_object, shaped(48, 10, false)), &["not a JSON object"]);
    }
    refused(hf_config(&params(), |_| None), &["no tensor"]);
    refused(hf_config(&params(), |_| Some(vec![1])), &["has shape [1]"]);
    let shapes = |name: &str| shaped(48, 10, false)(name).filter(|_| !name.contains("norm"));
    refused(hf_config(&params(), shapes), &["n_layers", "layers.0.attention_norm"]);
    // What changes nothing may be there, and all may stand under "model".
    let mut harmless = params();
    harmless["max_seq_len"] = json!(512);
    harmless["moe"] = json!(null);
    harmless["sliding_window"] = json!(false);
    let config = hf_config(&json!({"model": harmless}), shaped(48, 10, false)).unwrap();
    assert_eq!(config, hf_config(&params(), shaped(48, 10, false)).unwrap());
}

// ------------------------------------------------------------------------------------- merge

/// One layer over `count` files; the embedding cut in rows or columns.
fn model(count: usize, embedding_by_rows: bool) -> Vec<Vec<StoredTensor>> {
    let n = count;
    let kv_rows = if n <= 2 { 8 / n } else { 4 };
    let tensors = [
        ("tok_embeddings", if embedding_by_rows { vec![8 / n, 16] } else { vec![8, 16 / n] }),
        ("norm", vec![16]),
        ("output", vec![8 / n, 16]),
        ("layers.0.attention_norm", vec![16]),
        ("layers.0.ffn_norm", vec![16]),
        ("layers.0.attention.wq", vec![16 / n, 16]),
        ("layers.0.attention.wk", vec![kv_rows, 16]),
        ("layers.0.attention.wv", vec![kv_rows, 16]),
        ("layers.0.attention.wo", vec![16, 16 / n]),
        ("layers.0.feed_forward.w1", vec![48 / n, 16]),
        ("layers.0.feed_forward.w2", vec![16, 48 / n]),
        ("layers.0.feed_forward.w3", vec![48 / n, 16]),
    ];
    let stored = |(name, shape): &(&str, Vec<usize>)| StoredTensor {
        name: format!("{name}.weight"),
        dtype: StoredDtype::F16,
        shape: shape.clone(),
        offset: 64,
    };
    (0..count).map(|_| tensors.iter().map(stored).collect()).collect()
}

fn of_vocab(vocab_size: i64) -> Value {
    let mut params = params();
    params["vocab_size"] = json!(vocab_size);
    params
}

fn find<'a>(merged: &'a [Merged], name: &str) -> &'a Merged {
    merged.iter().find(|t| t.name.contains(name)).unwrap()
}

#[test]
fn the_embedding_is_cut_in_rows_or_columns() {
    for vocab_size in [8, -1] {
        for count in [1, 2, 4, 8] {
            for by_rows in [true, false] {
                let merged = merge(model(count, by_rows), &of_vocab(vocab_size)).unwrap();
                let embedding = find(&merged, "tok_embeddings");
                assert_eq!(embedding.shape, [8, 16]);
                let piece = embedding.pieces.last().unwrap();
                let expected = match by_rows {
                    _ if count == 1 => (0..8, 0..16),
                    true => (8 - 8 / count..8, 0..16),
                    false => (0..8, 16 - 16 / count..16),
                };
                assert_eq!((piece.rows.clone(), piece.cols.clone()), expected);
                assert_eq!(embedding.pieces.len(), count);
            }
        }
        // All may hold it whole.
        let mut files = model(4, true);
        files.iter_mut().for_each(|file| file[0].shape = vec![8, 16]);
        let merged = merge(files, &of_vocab(vocab_size)).unwrap();
        assert_eq!(find(&merged, "tok_embeddings").pieces.len(), 1);
    }
    let mut files = model(2, true);
    files.iter_mut().for_each(|file| file[0].shape = vec![3, 16]);
    refused(merge(files, &of_vocab(8)), &["tok_embeddings.weight", "[3, 16]", "[8, 16]"]);
}

#[test]
fn a_tied_embedding_alone_tells_the_vocabulary() {
    for by_rows in [true, false] {
        let mut files = model(2, by_rows);
        files.iter_mut().for_each(|file| file.retain(|t| t.name != "output.weight"));
        let merged = merge(files, &of_vocab(-1)).unwrap();
        assert_eq!(find(&merged, "tok_embeddings").shape, [8, 16]);
    }
}

#[test]
fn kv_heads_fewer_than_files_are_taken_from_the_first_that_has_them() {
    for (count, files) in [(1, vec![0]), (2, vec![0, 1]), (4, vec![0, 2]), (8, vec![0, 4])] {
        let merged = merge(model(count, true), &of_vocab(8)).unwrap();
        for name in ["wk", "wv"] {
            let tensor = find(&merged, name);
            assert_eq!(tensor.shape, [8, 16]);
            let from: Vec<usize> = tensor.pieces.iter().map(|piece| piece.file).collect();
            assert_eq!(from, files);
            let rows: Vec<usize> = tensor.pieces.iter().flat_map(|p| p.rows.clone()).collect();
            assert_eq!(rows, (0..8).collect::<Vec<_>>());
        }
    }
}

#[test]
fn norms_come_from_the_first_file_and_frequencies_are_left_out() {
    let mut files = model(2, true);
    let frequencies = StoredTensor { name: "rope.freqs".into(), ..files[0][0].clone() };
    files[0].push(frequencies);
    let merged = merge(files, &of_vocab(8)).unwrap();
    assert_eq!(merged.len(), 12);
    let norm = find(&merged, "ffn_norm");
    assert_eq!(norm.shape, [16]);
    assert_eq!(norm.pieces, [Piece { file: 0, offset: 64, rows: 0..1, cols: 0..16 }]);
}

#[test]
fn files_that_do_not_fit_each_other_are_refused_by_file_and_tensor() {
    type Damage = fn(&mut Vec<Vec<StoredTensor>>);
    let cases: [(Damage, &[&str]); 11] = [
        (|f| drop(f[1].remove(5)), &["consolidated.01.pth", "wq.weight", "missing"]),
        (|f| drop(f[0].remove(5)), &["consolidated.01.pth", "wq.weight", "not in consolidated.00"]),
        (|f| f[1][5].shape = vec![4, 16], &["consolidated.01.pth", "wq.weight", "[4, 16]"]),
        (|f| f[1][5].dtype = StoredDtype::Bf16, &["consolidated.01.pth", "wq", "Bf16", "F16"]),
        (|f| f.truncate(1), &["consolidated.00.pth", "does not fit"]),
        (|f| f.clear(), &["no consolidated"]),
        (|f| f.iter_mut().for_each(|f| f[1].shape = vec![8]), &["norm.weight", "[8]", "[16]"]),
        (|f| f.iter_mut().for_each(|f| f[5].shape = vec![16, 16]), &["wq.weight", "does not fit"]),
        (|f| f.iter_mut().for_each(|f| f[8].shape = vec![16, 16]), &["wo.weight", "does not fit"]),
        (
            |f| f.iter_mut().for_each(|f| f[5].name = "layers.1.attention.wq.weight".into()),
            &["layers.1", "no such tensor"],
        ),
        (
            |f| f.iter_mut().for_each(|f| f[5].name = "layers.0.attention.wq.bias".into()),
            &["wq.bias", "no such tensor"],
        ),
    ];
    for (damage, words) in cases {
        let mut files = model(2, true);
        damage(&mut files);
        refused(merge(files, &of_vocab(8)), words);
    }
    let mut files = model(2, true);
    files.iter_mut().for_each(|file| file[9].shape = vec![usize::MAX, 16]);
    refused(merge(files, &of_vocab(8)), &["feed_forward.w1"]);
}
