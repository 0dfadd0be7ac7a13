//! Files that torch wrote (tests/golden/meta.py), and files that nobody should read.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::super::files::indexed;
use super::super::{StoredDtype, StoredTensor};
use super::{pickle, read, zip};
use crate::ErrorKind;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn torch_file(name: &str) -> Vec<u8> {
    std::fs::read(golden("torch_files").join(name)).unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    let error = read(bytes).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Input);
    error.message
}

// ------------------------------------------------------------------ what torch wrote

/// The f32 values of tensor `name`.
fn values(bytes: &[u8], tensors: &[StoredTensor], name: &str) -> Vec<f32> {
    let tensor = tensors.iter().find(|t| t.name == name).unwrap();
    let len: usize = tensor.shape.iter().product();
    assert_eq!(tensor.dtype, StoredDtype::F32);
    let (values, _) = bytes[tensor.offset..].as_chunks::<4>();
    values[..len].iter().map(|value| f32::from_le_bytes(*value)).collect()
}

fn counted(range: std::ops::Range<u8>) -> Vec<f32> {
    range.map(f32::from).collect()
}

#[test]
fn tensors_are_found_where_torch_put_them() {
    for name in ["flat.pth", "protocol4.pth", "wrapped.pth"] {
        let bytes = torch_file(name);
        let tensors = read(&bytes).unwrap();
        assert_eq!(values(&bytes, &tensors, "f32"), counted(0..24), "{name}");
        // Views of the same storage.
        assert_eq!(values(&bytes, &tensors, "rows"), counted(6..18), "{name}");
        assert_eq!(values(&bytes, &tensors, "parameter"), counted(18..24), "{name}");
        assert_eq!(values(&bytes, &tensors, "one_row"), [8.0], "{name}");
        assert_eq!(values(&bytes, &tensors, "scalar"), [7.0], "{name}");
        assert!(values(&bytes, &tensors, "empty").is_empty(), "{name}");
        let kinds: Vec<_> = tensors
            .iter()
            .map(|t| (t.name.as_str(), t.shape.as_slice(), t.dtype.clone()))
            .collect();
        let other = |name: &str| StoredDtype::Other(name.into());
        let expected: [(&str, &[usize], StoredDtype); 10] = [
            ("f32", &[4, 6], StoredDtype::F32),
            ("bf16", &[4, 6], StoredDtype::Bf16),
            ("f16", &[4, 6], StoredDtype::F16),
            ("rows", &[2, 6], StoredDtype::F32),
            ("scalar", &[], StoredDtype::F32),
            ("parameter", &[6], StoredDtype::F32),
            ("int64", &[3], other("I64")),
            ("bool", &[2], other("BOOL")),
            ("one_row", &[1, 1], StoredDtype::F32),
            ("empty", &[0, 6], StoredDtype::F32),
        ];
        assert_eq!(kinds, expected, "{name}");
    }
}

#[test]
fn the_attributes_of_a_modules_state_are_passed_over() {
    let tensors = read(&torch_file("module.pth")).unwrap();
    let shapes: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.shape.clone())).collect();
    assert_eq!(shapes, [("weight", vec![2, 6]), ("bias", vec![2])]);
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    for (file, words) in [
        ("not_contiguous.pth", &["\"turned\"", "not contiguous"][..]),
        ("other_class.pth", &["\"torch.float16\""]),
        ("bare_tensor.pth", &["no dictionary"]),
        ("legacy.pth", &["before version 1.6", "safetensors"]),
    ] {
        let message = refusal(&torch_file(file));
        for word in words {
            assert!(message.contains(word), "{file}: {message}");
        }
    }
    assert!(refusal(b"version https://git-lfs.github.com/spec/v1\n").contains("git lfs pull"));
    assert!(refusal(b"").contains("cut short"));
}

#[test]
fn shards_hold_the_same_bytes_as_the_safetensors_file() {
    let source = std::fs::read(golden("llama_bf16/model.safetensors")).unwrap();
    let source = safetensors::SafeTensors::deserialize(&source).unwrap();
    let paths = indexed(&golden("llama_bin"), "pytorch_model.bin").unwrap().unwrap();
    assert_eq!(paths.len(), 2);
    let mut seen = 0;
    for path in paths {
        let bytes = std::fs::read(path).unwrap();
        for tensor in read(&bytes).unwrap() {
            let want = source.tensor(&tensor.name).unwrap();
            assert_eq!(tensor.shape, want.shape());
            assert_eq!(tensor.dtype, StoredDtype::Bf16);
            assert!(bytes[tensor.offset..].starts_with(want.data()), "{}", tensor.name);
            seen += 1;
        }
    }
    assert_eq!(seen, source.len());
}

// ------------------------------------------------------------------ made pickles

/// A pickle, opcode by opcode.
#[derive(Clone, Default)]
struct Ops(Vec<u8>);

impl Ops {
    fn new() -> Self {
        Self(vec![0x80, 2])
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn text(self, text: &str) -> Self {
        self.raw(b"X").raw(&(text.len() as u32).to_le_bytes()).raw(text.as_bytes())
    }
    fn int(self, n: i32) -> Self {
        self.raw(b"J").raw(&n.to_le_bytes())
    }
    fn global(self, module: &str, name: &str) -> Self {
        self.raw(format!("c{module}\n{name}\n").as_bytes())
    }
    fn ints(self, ints: &[i32]) -> Self {
        ints.iter().fold(self.raw(b"("), |ops, n| ops.int(*n)).raw(b"t")
    }
    /// An f32 tensor in record data/0, which has `len` values.
    fn tensor(self, len: i32, offset: i32, shape: &[i32], strides: &[i32]) -> Self {
        let shape = Self::default().ints(shape).ints(strides).0;
        self.tensor_with(len, offset, &shape)
    }
    /// The same; `shape` are the opcodes of shape and strides.
    fn tensor_with(self, len: i32, offset: i32, shape: &[u8]) -> Self {
        self.global("torch._utils", "_rebuild_tensor_v2")
            .raw(b"((")
            .text("storage")
            .global("torch", "FloatStorage")
            .text("0")
            .text("cpu")
            .int(len)
            .raw(b"tQ")
            .int(offset)
            .raw(shape)
            .raw(b"\x89")
            .global("collections", "OrderedDict")
            .raw(b")RtR")
    }
    fn file(self) -> Vec<u8> {
        file(&self.raw(b".").0, &[0; 24])
    }
}

/// torch's records around `pickle`, with one storage.
fn file(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    zip_of(&[
        ("w/data.pkl", pickle),
        ("w/byteorder", b"little"),
        ("w/data/0", storage),
        ("w/version", b"3\n"),
    ])
}

fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut directory = Vec::new();
    for (name, data) in entries {
        let header = bytes.len() as u32;
        let sizes = [data.len() as u32; 2].map(u32::to_le_bytes).concat();
        let name_len = (name.len() as u16).to_le_bytes();
        bytes.extend([b"PK\x03\x04".as_slice(), &[0; 14], &sizes, &name_len, &[0; 2]].concat());
        bytes.extend(name.as_bytes());
        bytes.extend(*data);
        directory.extend([b"PK\x01\x02".as_slice(), &[0; 16], &sizes, &name_len].concat());
        directory.extend([&[0; 12], header.to_le_bytes().as_slice(), name.as_bytes()].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let place = [directory.len() as u32, bytes.len() as u32].map(u32::to_le_bytes).concat();
    bytes.extend(directory);
    bytes.extend([b"PK\x05\x06".as_slice(), &[0; 4], &count, &count, &place, &[0; 2]].concat());
    bytes
}

/// `{"w": tensor}` of six values.
fn good() -> Ops {
    Ops::new().raw(b"}").text("w").tensor(6, 0, &[2, 3], &[3, 1]).raw(b"s")
}

#[test]
fn a_made_file_is_read() {
    let bytes = good().file();
    let tensors = read(&bytes).unwrap();
    assert_eq!(tensors[0].shape, [2, 3]);
    assert_eq!(values(&bytes, &tensors, "w"), [0.0; 6]);
}

#[test]
fn nothing_is_executed() {
    let call = |module, name| {
        Ops::new().global(module, name).raw(b"(").text("touch /tmp/owned").raw(b"tR").file()
    };
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch.storage", "UntypedStorage"),
        ("torch.jit", "_script"),
        ("torch", "FloatStorage.x"),
        ("numpy.core.multiarray", "_reconstruct"),
    ] {
        let message = refusal(&call(module, name));
        assert!(message.contains(&format!("\"{module}.{name}\"")), "{message}");
        assert!(message.contains("nothing is executed"), "{message}");
    }
    let by_stack = Ops::new().text("os").text("system").raw(b"\x93").text("id").raw(b"\x85R");
    assert!(refusal(&by_stack.file()).contains("\"os.system\""));
    // INST and OBJ, which also call; extension registry; newer ways to make objects.
    for op in [b'i', b'o', 0x81, 0x82, 0x83, 0x84, 0x92, b'P', b'2', b'0', b'1', b'I', b'F'] {
        assert!(refusal(&good().raw(&[op]).file()).contains("opcode"), "{op:#x}");
    }
    // A name as long as a book is not repeated whole, nor are its control characters.
    let long = Ops::new().global("os\x1b[31m", &"x".repeat(100_000)).file();
    let message = refusal(&long);
    assert!(message.len() < 500 && !message.contains('\x1b'), "{message}");
}

#[test]
fn tensors_that_do_not_fit_their_storage_are_refused() {
    for (len, offset, shape, strides, word) in [
        (6, 1, &[2, 3][..], &[3, 1][..], "beyond its storage"),
        (6, 0, &[7], &[1], "beyond its storage"),
        (7, 0, &[2, 3], &[3, 1], "has 24 bytes, too few for 7 values"),
        (i32::MAX, 0, &[2, 3], &[3, 1], "too few"),
        (6, i32::MAX, &[1], &[1], "beyond its storage"),
        (6, 0, &[i32::MAX; 3], &[1; 3], "beyond its storage"),
        (6, 0, &[2, 3], &[1, 2], "not contiguous"),
        (6, 0, &[2, 3], &[0, 0], "not contiguous"),
        (6, 0, &[2, 3], &[1], "not contiguous"),
        (6, 0, &[-2, 3], &[3, 1], "negative"),
        (6, -1, &[2, 3], &[3, 1], "negative"),
        (-6, 0, &[2, 3], &[3, 1], "negative"),
        (6, 0, &[1; 17], &[1; 17], "17 dimensions"),
    ] {
        let ops = Ops::new().raw(b"}").text("w").tensor(len, offset, shape, strides).raw(b"s");
        let message = refusal(&ops.file());
        assert!(message.contains(word), "{shape:?}: {message}");
    }
    let message = refusal(&zip_of(&[("w/data.pkl", &good().raw(b".").0)]));
    assert!(message.contains("tensor \"w\": the file has no record \"data/0\""), "{message}");
    let elsewhere = good().0.split(|b| *b == b'0').collect::<Vec<_>>().join(b"/".as_slice());
    assert!(
        refusal(&file(&[&elsewhere, b".".as_slice()].concat(), &[0; 24])).contains("no record")
    );
}

#[test]
fn values_of_the_other_byte_order_are_refused() {
    let pickle = good().raw(b".").0;
    let bytes = zip_of(&[("w/data.pkl", &pickle), ("w/byteorder", b"big"), ("w/data/0", &[0; 24])]);
    assert!(refusal(&bytes).contains("little-endian"));
}

#[test]
fn names_are_text_and_unique() {
    let twice = good().text("w").tensor(6, 0, &[6], &[1]).raw(b"s");
    assert!(refusal(&twice.file()).contains("two tensors are called \"w\""));
    let number = Ops::new().raw(b"}").int(1).tensor(6, 0, &[6], &[1]).raw(b"s");
    assert!(refusal(&number.file()).contains("not text"));
    let not_utf8 = Ops::new().raw(b"}X\x01\0\0\0\xff").tensor(6, 0, &[6], &[1]).raw(b"s");
    assert!(refusal(&not_utf8.file()).contains("not text"));
}

#[test]
fn containers_that_contain_themselves_are_refused() {
    // d["d"] = d; a list in itself; a dictionary in a tuple in a list in it.
    let cycles: [&[u8]; 3] =
        [b"}q\0X\x01\0\0\0dh\0s.", b"]q\0h\0a.", b"}q\0X\x01\0\0\0d]q\x01h\0\x85h\0\x86as."];
    for cycle in cycles {
        assert!(refusal(&file(cycle, &[])).contains("contains itself"), "{cycle:?}");
    }
    // The same container twice is none.
    let shared = good().text("x").raw(b"}q\0s").text("y").raw(b"h\0s");
    read(&shared.file()).unwrap();
}

#[test]
fn deep_nesting_is_refused_without_recursion() {
    let nested = |depth: usize| Ops(b")".to_vec()).raw(&b"\x85".repeat(depth)).file();
    assert!(refusal(&nested(50)).contains("no dictionary"));
    assert!(refusal(&nested(1_000_000)).contains("containers in each other"));
    // Lists, each open in the one before.
    let ops = Ops::default().raw(&b"]".repeat(1_000_000)).raw(&b"a".repeat(999_999));
    assert!(refusal(&ops.file()).contains("containers in each other"));
}

#[test]
fn references_that_would_grow_without_end_stay_references() {
    // Each tuple holds the one before twice: 2^90 leaves if they were copied.
    let ops = Ops::default().raw(b")q\0").raw(&b"h\0\x86q\0".repeat(90));
    assert!(refusal(&ops.file()).contains("no dictionary"));
    // A shape that many tensors share is copied for each, so it must be short.
    let long = Ops::default().raw(b"(").raw(&b"K\x01".repeat(100_000)).raw(b"tq\0");
    assert!(refusal(&long.tensor_with(6, 0, b"h\0h\0").file()).contains("100000 dimensions"));
}

#[test]
fn the_work_is_bounded_by_a_number_of_operations() {
    let endless = Ops::default().raw(&b"N".repeat(3_000_000)).file();
    assert!(refusal(&endless).contains("operations"));
    let memo = Ops::default().raw(b")").raw(&b"\x94".repeat(3_000_000)).file();
    assert!(refusal(&memo).contains("operations"));
}

#[test]
fn lengths_beyond_the_end_allocate_nothing() {
    for op in [b"X", b"T", b"B", b"\x8b"] {
        let ops = Ops::new().raw(op).raw(&u32::MAX.to_le_bytes()).raw(b"text");
        assert!(refusal(&ops.file()).contains("a length beyond its end"), "{op:?}");
    }
    for op in [b"\x8d", b"\x8e"] {
        for len in [u64::MAX, u64::MAX / 2, 1 << 40] {
            let ops = Ops::new().raw(op).raw(&len.to_le_bytes()).raw(b"text");
            assert!(refusal(&ops.file()).contains("a length beyond its end"), "{op:?}");
        }
    }
    assert!(refusal(&Ops::new().raw(b"\x8a\xff").file()).contains("a length beyond"));
}

#[test]
fn misuse_of_the_stack_is_refused() {
    for ops in [
        &b"."[..],
        b"",
        b"t.",
        b"(.",
        b"N(N.",
        b"NN.",
        b"}(Nu.",
        b"}Ns.",
        b"Na.",
        b"]Ns.",
        b"}Na.",
        b"q\0.",
        b"h\0.",
        b"j\0\0\0\0.",
        b"\x94.",
        b"R.",
        b"NR.",
        b"N)R.",
        b")NR.",
        b"Q.",
        b"NQ.",
        b")Q.",
        b"b.",
        b"Nb.",
        b"NNb.",
        b"\x93.",
        b"NN\x93.",
        b"\x85.",
        b"N\x86.",
        b"N(\x85.",
        b"\x80\x01N.",
        b"\x80\x09N.",
        b"c",
        b"ca\n",
        b"ca\nb",
        b"c\xff\nb\n.",
        b"K",
        b"M\0",
        b"G\0",
        b"ccollections\nOrderedDict\n.",
        b"ccollections\nOrderedDict\nN\x85R.",
        b"ctorch\nFloatStorage\n)R.",
    ] {
        let message = refusal(&file(ops, &[]));
        assert!(
            message.contains("data.pkl") || message.contains("no dictionary"),
            "{ops:?}: {message}"
        );
    }
}

// ------------------------------------------------------------------ damaged zip files

/// Reads `bytes`, which may be anything; what comes of it lies inside them.
fn survives(bytes: &[u8]) -> bool {
    match read(bytes) {
        Err(error) => {
            assert_eq!(error.kind, ErrorKind::Input);
            false
        }
        Ok(tensors) => {
            for tensor in tensors {
                let size = match tensor.dtype {
                    StoredDtype::F32 => 4,
                    StoredDtype::F16 | StoredDtype::Bf16 => 2,
                    _ => 1,
                };
                let len = tensor.shape.iter().product::<usize>() * size;
                assert!(tensor.offset.checked_add(len).unwrap() <= bytes.len());
            }
            true
        }
    }
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    for bytes in [good().file(), torch_file("flat.pth")] {
        for len in 0..bytes.len() {
            assert!(!survives(&bytes[..len]), "{len}");
        }
        assert!(survives(&bytes));
    }
}

#[test]
fn any_byte_may_be_any_other() {
    for mut bytes in [good().file(), torch_file("flat.pth"), torch_file("protocol4.pth")] {
        for at in 0..bytes.len() {
            for mask in [0xff, 1, 0x80, 0x10] {
                bytes[at] ^= mask;
                survives(&bytes);
                bytes[at] ^= mask;
            }
        }
    }
}

/// The directory entry of `name` in `bytes`, and the end record.
fn records(bytes: &[u8], name: &str) -> (usize, usize) {
    let end = bytes.len() - 22;
    let name = name.as_bytes();
    let at = bytes.windows(name.len()).rposition(|window| window == name).unwrap();
    (at - 46, end)
}

fn patched(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

#[test]
fn a_directory_that_lies_is_refused() {
    let bytes = good().file();
    let (entry, end) = records(&bytes, "w/data/0");
    let sizes = |n: u32| [n.to_le_bytes(), n.to_le_bytes()].concat();
    for (what, at, with, word) in [
        ("reaches beyond the end", entry + 20, sizes(1 << 20), "reaches beyond"),
        ("into the next entry", entry + 20, sizes(30), "overlap"),
        ("into the directory", entry + 20, sizes(200), "reaches beyond"),
        ("two sizes", entry + 24, vec![1, 0, 0, 0], "two sizes"),
        ("compressed", entry + 10, vec![8], "compressed"),
        ("encrypted", entry + 8, vec![1], "encrypted"),
        ("the place of another", entry + 42, vec![0; 4], "another name"),
        ("no header there", entry + 42, vec![1, 0, 0, 0], "beyond the end"),
        ("far away", entry + 42, vec![0xfe; 4], "beyond the end"),
        ("zip64 without a field", entry + 20, sizes(u32::MAX), "cut short"),
        ("long name", entry + 28, vec![0xff, 0xff], "cut short"),
        ("count", end + 10, vec![9, 0], "counts 9"),
        ("count for zip64", end + 10, vec![0xff, 0xff], "zip64"),
        ("directory size", end + 12, vec![1, 0, 0, 0], "not where"),
        ("directory start", end + 16, vec![0xfe; 4], "not where"),
        ("comment", end + 20, vec![1, 0], "no end record"),
    ] {
        let message = refusal(&patched(&bytes, at, &with));
        assert!(message.contains(word), "{what}: {message}");
    }
    let twice = zip_of(&[("w/data.pkl", b"N."), ("w/data.pkl", b"N.")]);
    assert!(refusal(&twice).contains("two entries are called"));
    assert!(refusal(&zip_of(&[])).contains("no data.pkl"));
    assert!(refusal(&zip_of(&[("data.pkl", b"N.")])).contains("no data.pkl"));
    // Two names for the same bytes: the second entry's header is put over the first's place.
    let alias = zip_of(&[("w/data/0", b"abcd"), ("w/data/1", b"abcd")]);
    let (entry, _) = records(&alias, "w/data/1");
    assert!(refusal(&patched(&alias, entry + 42, &[0; 4])).contains("another name"));
}

/// `bytes` with zip64 records between directory and end, and the end record saturated.
fn zip64(bytes: &[u8], record: [u64; 4]) -> Vec<u8> {
    let end = bytes.len() - 22;
    let mut out = bytes[..end].to_vec();
    let [count, size, start, at] = record.map(u64::to_le_bytes);
    out.extend([b"PK\x06\x06".as_slice(), &44_u64.to_le_bytes(), &[0; 12]].concat());
    out.extend([count, count, size, start].concat());
    out.extend([b"PK\x06\x07".as_slice(), &[0; 4], &at, &1_u32.to_le_bytes()].concat());
    out.extend(patched(&bytes[end..], 8, &[0xff; 12]));
    out
}

#[test]
fn zip64_records_count_where_they_are_true() {
    let bytes = good().file();
    let end = bytes.len() as u64 - 22;
    let start = u64::from(u32::from_le_bytes(bytes[end as usize + 16..][..4].try_into().unwrap()));
    assert!(survives(&zip64(&bytes, [4, end - start, start, end])));
    for lie in [
        [4, end - start, start, end + 1],
        [4, end - start, start, u64::MAX],
        [4, end - start, start, 0],
        [u64::MAX, end - start, start, end],
        [3, end - start, start, end],
        [4, u64::MAX, start, end],
        [4, end - start + 1, start - 1, end],
        [4, u64::MAX - start + 2, start, end],
        [4, end - start, u64::MAX, end],
        [0, 0, end, end],
    ] {
        assert!(!survives(&zip64(&bytes, lie)), "{lie:?}");
    }
    // The same facts in an entry's extra field, in place of its 32-bit ones.
    let extra = |size: u64, header: u64| {
        let (entry, end) = records(&bytes, "w/version");
        let wide = [size, size, header].map(u64::to_le_bytes).concat();
        let field = [&[1, 0, 24, 0], wide.as_slice()].concat();
        let mut out = patched(&bytes, entry + 20, &[0xff; 8]);
        out = patched(&out, entry + 42, &[0xff; 4]);
        out = patched(&out, entry + 30, &[28, 0]);
        let size = u32::from_le_bytes(out[end + 12..][..4].try_into().unwrap()) + 28;
        out = patched(&out, end + 12, &size.to_le_bytes());
        out.splice(end..end, field);
        out
    };
    let (entry, _) = records(&bytes, "w/version");
    let header = u32::from_le_bytes(bytes[entry + 42..][..4].try_into().unwrap()).into();
    assert!(survives(&extra(2, header)));
    for (size, header) in
        [(u64::MAX, header), (1 << 40, header), (2, u64::MAX), (2, 0), (3, header)]
    {
        assert!(!survives(&extra(size, header)), "{size} {header}");
    }
}

// ------------------------------------------------------------------ anything

/// One opcode with operands that make sense now and then.
fn fragment() -> impl Strategy<Value = Vec<u8>> {
    let good = Just(good().0[2..].to_vec());
    let words =
        proptest::sample::select(vec!["storage", "0", "w", "model", "torch", "FloatStorage"]);
    let bare = proptest::sample::select(b"(.NQ)]}taesubR\x85\x86\x87\x88\x89\x93\x94".to_vec());
    prop_oneof![
        1 => good,
        2 => words.prop_map(|text| Ops::default().text(text).0),
        2 => (0..9_i32).prop_map(|n| Ops::default().int(n).0),
        8 => bare.prop_map(|op| vec![op]),
        3 => (proptest::sample::select(b"qhK".to_vec()), 0..6_u8).prop_map(|(op, n)| vec![op, n]),
        1 => Just(Ops::default().global("torch", "HalfStorage").0),
        1 => Just(Ops::default().global("collections", "OrderedDict").0),
        1 => Just(Ops::default().global("torch._utils", "_rebuild_tensor_v2").0),
        1 => Just(Ops::default().global("torch._utils", "_rebuild_parameter").0),
        1 => proptest::collection::vec(any::<u8>(), 1..12),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_opcodes_end_in_tensors_or_an_error(
        ops in proptest::collection::vec(fragment(), 0..60)
    ) {
        let pickle = ops.concat();
        survives(&file(&[&pickle, b".".as_slice()].concat(), &[0; 24]));
        if let Err(error) = pickle::tensors(&pickle) {
            prop_assert!(error.message.len() < 600);
        }
    }

    #[test]
    fn any_bytes_end_in_entries_or_an_error(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        at in 0..400_usize,
    ) {
        let _ = zip::Archive::open(&bytes);
        let mut whole = good().file();
        let at = at.min(whole.len());
        let end = (at + bytes.len()).min(whole.len());
        whole[at..end].copy_from_slice(&bytes[..end - at]);
        survives(&whole);
    }
}
