use std::time::Instant;

use proptest::prelude::*;

use super::super::testing::GgufBuilder;
use super::*;

/// A file with something of everything.
fn sample() -> GgufBuilder {
    let nested = [&9u32.to_le_bytes()[..], &2u64.to_le_bytes(), &empty_array(), &empty_array()];
    GgufBuilder::new("llama")
        .uint("llama.block_count", 2)
        .float("llama.rope.freq_base", 10_000.0)
        .bool("tokenizer.ggml.add_bos_token", true)
        .strings("tokenizer.ggml.tokens", &["<unk>", "", "ä"])
        .floats("tokenizer.ggml.scores", &[0.0, -1.5, 2.0])
        .ints("tokenizer.ggml.token_type", &[2, -1, 1])
        .raw("nested", 9, nested.concat())
        .f32s("plain", &[2, 3], &[1.0; 6])
        .quantized("blocks", QuantType::Q4_K, &[2, 256], vec![7; 288])
        .tensor("half", 1, &[5], vec![0; 10])
}

fn empty_array() -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat()
}

fn refused(builder: &GgufBuilder, why: &str) {
    refused_bytes(&builder.build(), why);
}

fn refused_bytes(bytes: &[u8], why: &str) {
    let message = read(bytes).unwrap_err().to_string();
    assert!(message.contains(why), "{message:?} does not say {why:?}");
}

/// Bytes on the heap, counting what is reserved.
fn heap_bytes(file: &GgufFile) -> usize {
    let value = |value: &Value| match value {
        Value::String(s) => s.capacity(),
        Value::Ints(v) => v.capacity() * 8,
        Value::Floats(v) => v.capacity() * 4,
        Value::Strings(v) => {
            v.capacity() * size_of::<String>() + v.iter().map(String::capacity).sum::<usize>()
        }
        _ => 0,
    };
    let pairs = file.metadata.0.iter().map(|(key, v)| key.capacity() + value(v)).sum::<usize>();
    let table = file.metadata.0.capacity() * (size_of::<(String, Value)>() + 1);
    let tensors = &file.tensors;
    let named = tensors.iter().map(|t| t.name.capacity() + t.shape.capacity() * 8).sum::<usize>();
    pairs + table + tensors.capacity() * size_of::<StoredTensor>() + named
}

#[test]
fn reads_what_was_written() {
    for version in [2, 3] {
        let bytes = GgufBuilder { version, ..sample() }.build();
        let file = read(&bytes).unwrap();
        let metadata = &file.metadata;
        assert_eq!(metadata.str("general.architecture"), Some("llama"));
        assert_eq!(metadata.uint("llama.block_count"), Some(2));
        assert_eq!(metadata.float("llama.rope.freq_base"), Some(10_000.0));
        assert_eq!(metadata.bool("tokenizer.ggml.add_bos_token"), Some(true));
        assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap(), ["<unk>", "", "ä"]);
        assert_eq!(metadata.floats("tokenizer.ggml.scores"), Some(&[0.0, -1.5, 2.0][..]));
        assert_eq!(metadata.ints("tokenizer.ggml.token_type"), Some(&[2, -1, 1][..]));
        assert!(!metadata.0.contains_key("nested"));

        let [plain, blocks, half] = &file.tensors[..] else { panic!("three tensors") };
        assert_eq!((&plain.name[..], &plain.shape[..]), ("plain", &[2, 3][..]));
        assert_eq!(plain.dtype, StoredDtype::F32);
        assert_eq!(&bytes[plain.offset..plain.offset + 4], 1.0f32.to_le_bytes());
        assert_eq!(blocks.dtype, StoredDtype::Quant(QuantType::Q4_K));
        assert_eq!(bytes[blocks.offset..blocks.offset + 288], [7; 288]);
        assert_eq!(half.dtype, StoredDtype::F16);
        assert!(file.tensors.iter().all(|t| t.offset % 32 == 0));
    }
}

#[test]
fn integers_of_every_width() {
    let file = GgufBuilder::default()
        .raw("u8", 0, vec![200])
        .raw("i8", 1, vec![200])
        .raw("u16", 2, vec![0, 200])
        .raw("i16", 3, vec![0, 200])
        .raw("u32", 4, vec![0, 0, 0, 200])
        .raw("i32", 5, vec![0, 0, 0, 200])
        .raw("u64", 10, (i64::MAX as u64).to_le_bytes().to_vec())
        .raw("i64", 11, i64::MIN.to_le_bytes().to_vec())
        .raw("too large", 10, u64::MAX.to_le_bytes().to_vec())
        .raw("f64", 12, 0.1f64.to_le_bytes().to_vec())
        .raw("bools", 9, [&7u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[1, 0]].concat())
        .build();
    let metadata = read(&file).unwrap().metadata;
    let int = |key: &str| match metadata.0.get(key) {
        Some(Value::Int(n)) => Some(*n),
        _ => None,
    };
    let small = ["u8", "i8", "u16", "i16", "u32", "i32"].map(|key| int(key).unwrap());
    assert_eq!(small, [200, -56, 51_200, -14_336, 200 << 24, -56 << 24]);
    assert_eq!((int("u64"), int("i64")), (Some(i64::MAX), Some(i64::MIN)));
    assert_eq!(int("too large"), None);
    assert_eq!(metadata.float("f64"), Some(0.1));
    assert_eq!(metadata.ints("bools"), Some(&[1, 0][..]));
}

#[test]
fn other_types_keep_their_ggml_name() {
    let file = GgufBuilder::default()
        .tensor("a", 23, &[256], vec![0; 136])
        .tensor("b", 39, &[32], vec![0; 17])
        .tensor("c", 31, &[32], vec![])
        .tensor("d", 30, &[], vec![0; 2]);
    let tensors = read(&file.build()).unwrap().tensors;
    let dtype = |i: usize| tensors[i].dtype.clone();
    assert_eq!(dtype(0), StoredDtype::Other("IQ4_XS".into()));
    assert_eq!(dtype(1), StoredDtype::Other("MXFP4".into()));
    assert_eq!(dtype(2), StoredDtype::Other("ggml type 31".into()));
    assert_eq!((dtype(3), tensors[3].shape.len()), (StoredDtype::Bf16, 0));
}

#[test]
fn block_sizes_are_those_of_the_kernels() {
    for quant in QuantType::ALL {
        let id = (0..64).find(|&id| QuantType::from_ggml_id(id) == Some(quant)).unwrap();
        let (name, len, bytes) = ggml_type(id).unwrap();
        assert_eq!(name.to_lowercase(), quant.name());
        assert_eq!((len, bytes), (quant.block_len(), quant.block_bytes()));
    }
}

#[test]
fn the_alignment_of_the_file_counts() {
    for alignment in [1, 8, 64, 4096] {
        let bytes = GgufBuilder { alignment, ..sample() }.build();
        let tensors = read(&bytes).unwrap().tensors;
        assert!(tensors.iter().all(|t| t.offset % alignment == 0));
        let plain = tensors[0].offset;
        assert_eq!(&bytes[plain..plain + 4], 1.0f32.to_le_bytes());
    }
    refused(&GgufBuilder::default().uint("general.alignment", 0), "general.alignment");
    refused(&GgufBuilder::default().uint("general.alignment", 48), "general.alignment");
    refused(&GgufBuilder::default().str("general.alignment", "32"), "general.alignment");
}

#[test]
fn other_formats_and_versions_are_named() {
    refused_bytes(b"", "not a GGUF file");
    refused_bytes(b"ggjt\x03\0\0\0", "not a GGUF file");
    refused_bytes(b"GGUF\x01\0\0\0", "version 1");
    refused_bytes(b"GGUF\0\0\0\x03", "big-endian");
    refused_bytes(b"GGUF\x04\0\0\0", "version 4");
    refused_bytes(b"GGUF\x03\0", "cut short");
}

#[test]
fn duplicates_are_refused() {
    refused(&GgufBuilder::new("a").str("general.architecture", "b"), "\"general.architecture\"");
    let nested = [&9u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
    refused(
        &GgufBuilder::default().raw("n", 9, nested.clone()).raw("n", 9, nested),
        "stands twice",
    );
    let twice = GgufBuilder::default().f32s("w", &[1], &[0.0]).f32s("w", &[1], &[0.0]);
    refused(&twice, "tensor \"w\" stands twice");
}

#[test]
fn bad_values_are_refused() {
    let with = |kind: u32, bytes: &[u8]| GgufBuilder::default().raw("k", kind, bytes.to_vec());
    refused(&with(13, &[0; 8]), "key \"k\": a value of the unknown type 13");
    refused(&with(7, &[2]), "a boolean of value 2");
    refused(&GgufBuilder::default().str("", "x"), "a name of 0 bytes");
    refused(&GgufBuilder::default().str(&"k".repeat(70_000), "x"), "a name of 70000 bytes");
    refused_bytes(
        &[
            b"GGUF\x03\0\0\0",
            &0u64.to_le_bytes()[..],
            &1u64.to_le_bytes(),
            &2u64.to_le_bytes(),
            b"\xff\xff",
            &[0; 16],
        ]
        .concat(),
        "not UTF-8",
    );
    let text = [&3u64.to_le_bytes()[..], b"a\xffb"].concat();
    let metadata = read(&with(8, &text).build()).unwrap().metadata;
    assert_eq!(metadata.str("k"), Some("a\u{fffd}b"));
}

#[test]
fn arrays_nest_only_so_deep() {
    let nested = |depth: usize| {
        let level = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
        [level.repeat(depth), empty_array()].concat()
    };
    assert!(read(&GgufBuilder::default().raw("k", 9, nested(3)).build()).is_ok());
    refused(&GgufBuilder::default().raw("k", 9, nested(100_000)), "nested more than");
}

#[test]
fn bad_shapes_are_refused() {
    let tensor =
        |kind: u32, shape: &[usize]| GgufBuilder::default().tensor("w", kind, shape, vec![0; 64]);
    refused(&tensor(0, &[1, 1, 1, 1, 1]), "tensor \"w\": 5 dimensions");
    refused(&tensor(0, &[2, 0]), "a dimension is zero");
    refused(&tensor(0, &[usize::MAX, 2]), "too large");
    refused(&tensor(0, &[usize::MAX / 2]), "too large");
    refused(&tensor(0, &[17]), "past the end");
    refused(&tensor(2, &[32, 16]), "rows of 16 values are no whole number of Q4_0 blocks of 32");
    refused(&tensor(12, &[128]), "Q4_K blocks of 256");
    refused(&tensor(23, &[128]), "IQ4_XS blocks of 256");
}

#[test]
fn bad_offsets_are_refused() {
    let at = |offset: u64| {
        let mut file = GgufBuilder::default().f32s("a", &[8], &[0.0; 8]).f32s("b", &[8], &[0.0; 8]);
        file.tensors[1].offset = Some(offset);
        file
    };
    assert!(read(&at(32).build()).is_ok());
    refused(&at(8), "tensor \"b\": offset 8 is no multiple of the alignment 32");
    refused(&at(64), "past the end");
    refused(&at(1 << 40), "past the end");
    refused(&at(u64::MAX - 31), "past the end");
    refused(&at(0), "tensors \"a\" and \"b\" share bytes");
    let mut long = at(32);
    long.tensors[0].dims = vec![9];
    refused(&long, "share bytes");
}

#[test]
fn declared_sizes_beyond_the_file_fail_at_once() {
    let start = Instant::now();
    let header = |tensors: u64, pairs: u64| {
        [b"GGUF\x03\0\0\0", &tensors.to_le_bytes()[..], &pairs.to_le_bytes(), &[0; 64]].concat()
    };
    for n in [4, 1_000_000, 1 << 40, u64::MAX] {
        refused_bytes(&header(n, 0), &format!("{n} tensors are declared"));
        let pairs = n.max(5);
        refused_bytes(&header(0, pairs), &format!("{pairs} key-value pairs are declared"));
    }
    // 10^10 tokens, floats, bytes, arrays.
    let huge = 10_000_000_000u64.to_le_bytes();
    for (kind, what) in [(8u32, "texts"), (6, "values"), (0, "values"), (9, "arrays")] {
        let array = [&kind.to_le_bytes()[..], &huge, &[0; 999]].concat();
        let file = GgufBuilder::default().raw("tokenizer.ggml.tokens", 9, array);
        refused(&file, &format!("key \"tokenizer.ggml.tokens\": 10000000000 {what} are declared"));
    }
    let file = GgufBuilder::default().raw("k", 8, [&huge[..], b"abc"].concat());
    refused(&file, "10000000000 bytes of text are declared");
    assert!(start.elapsed().as_secs() < 5);
}

#[test]
fn dense_files_take_a_small_multiple_of_memory() {
    let bytes =
        |n: usize| [&0u32.to_le_bytes()[..], &(n as u64).to_le_bytes(), &vec![1; n]].concat();
    let (mut pairs, mut tensors) = (GgufBuilder::default(), GgufBuilder::default());
    for i in 0..20_000 {
        pairs = pairs.raw(&format!("{i:x}"), 0, vec![1]);
        tensors = tensors.tensor(&format!("{i:x}"), 31, &[1], Vec::new());
    }
    let texts = GgufBuilder::default().strings("k", &[""; 20_000]);
    for file in [pairs, tensors, texts, GgufBuilder::default().raw("k", 9, bytes(100_000))] {
        let file = file.build();
        assert!(read(&file).is_ok());
        check_any(&file);
    }
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample().build();
    // Only padding follows the last tensor.
    let last = bytes.len().next_multiple_of(32) - 32 + 10;
    for len in 0..last {
        assert!(read(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
    assert!(read(&bytes[..last]).is_ok());
}

#[test]
fn every_flipped_byte_is_survived() {
    let bytes = sample().build();
    for i in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[i] ^= flip;
            check_any(&bad);
        }
    }
}

/// Whatever the bytes: no panic, memory within a multiple of their number, and offsets and
/// shapes that can be used.
fn check_any(bytes: &[u8]) {
    let Ok(file) = read(bytes) else { return };
    assert!(heap_bytes(&file) <= 16 * bytes.len() + 4096);
    for tensor in &file.tensors {
        assert!(tensor.offset <= bytes.len());
        assert!(tensor.shape.len() <= 4 && !tensor.shape.contains(&0));
        let values = tensor.shape.iter().product::<usize>();
        let len = match tensor.dtype {
            StoredDtype::F32 => values * 4,
            StoredDtype::F16 | StoredDtype::Bf16 => values * 2,
            StoredDtype::Quant(quant) => values / quant.block_len() * quant.block_bytes(),
            StoredDtype::Other(_) => continue,
        };
        assert!(tensor.offset + len <= bytes.len());
    }
    let shape = |name: &str| Some(file.tensors.iter().find(|t| t.name == name)?.shape.clone());
    let _ = super::super::hf_config(&file.metadata, shape);
}

proptest! {
    #[test]
    fn random_bytes_are_survived(tail in proptest::collection::vec(any::<u8>(), 0..512)) {
        check_any(&tail);
        check_any(&[b"GGUF\x03\0\0\0", &tail[..]].concat());
        let counts = [&1u64.to_le_bytes()[..], &2u64.to_le_bytes()].concat();
        check_any(&[b"GGUF\x03\0\0\0", &counts[..], &tail].concat());
    }

    #[test]
    fn damaged_files_are_survived(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        end in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sample().build();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        check_any(&bytes);
        bytes.truncate(end.index(bytes.len()));
        check_any(&bytes);
    }

    #[test]
    fn what_is_written_is_read(
        ints in proptest::collection::vec(any::<i32>(), 0..20),
        texts in proptest::collection::vec(".{0,12}", 0..20),
        shapes in proptest::collection::vec(proptest::collection::vec(1usize..6, 1..=4), 0..8),
        power in 0u32..8,
    ) {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let mut builder = GgufBuilder::new("x").ints("ints", &ints).strings("texts", &texts);
        builder.alignment = 1 << power;
        for (i, shape) in shapes.iter().enumerate() {
            let values = vec![i as f32; shape.iter().product()];
            builder = builder.f32s(&format!("t{i}"), shape, &values);
        }
        let bytes = builder.build();
        let file = read(&bytes).unwrap();
        let wide: Vec<i64> = ints.iter().map(|&n| n as i64).collect();
        prop_assert_eq!(file.metadata.ints("ints"), Some(&wide[..]));
        prop_assert_eq!(file.metadata.strings("texts").unwrap(), &texts[..]);
        prop_assert_eq!(file.tensors.len(), shapes.len());
        for (i, (tensor, shape)) in file.tensors.iter().zip(&shapes).enumerate() {
            prop_assert_eq!(&tensor.shape, shape);
            let first = bytes[tensor.offset..tensor.offset + 4].try_into().unwrap();
            prop_assert_eq!(f32::from_le_bytes(first), i as f32);
        }
        check_any(&bytes);
    }
}
