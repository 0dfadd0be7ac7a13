//! The pickle in a torch.save file, read without running any of it.
//!
//! A pickle is a program for a stack machine (CPython's Lib/pickletools.py documents the
//! opcodes). What is understood here is what describes tensors: numbers, strings, tuples,
//! lists, dictionaries, torch's storages and the two functions that make tensors of them,
//! about as much as torch.load(weights_only=True) takes. Any other class or function is
//! refused by its name.
//!
//! Values live in tables and name each other by number, so nothing here is recursive, a
//! reference costs no copy, and memory is bounded by the number of opcodes ([`MAX_OPS`]).

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::{Error, Result};

/// Opcodes of a pickle. torch writes some 40 a tensor, so these are 50,000 tensors in a file;
/// what one opcode makes takes less than 200 bytes.
const MAX_OPS: usize = 1 << 21;
/// Containers in containers.
const MAX_DEPTH: u32 = 100;
/// Dimensions of a tensor; bounds what a shape shared by many tensors can cost.
const MAX_DIMS: usize = 16;

/// torch's storage classes: class, dtype as safetensors writes it, bytes a value.
const STORAGES: [(&str, &str, usize); 13] = [
    ("FloatStorage", "F32", 4),
    ("HalfStorage", "F16", 2),
    ("BFloat16Storage", "BF16", 2),
    ("DoubleStorage", "F64", 8),
    ("LongStorage", "I64", 8),
    ("IntStorage", "I32", 4),
    ("ShortStorage", "I16", 2),
    ("CharStorage", "I8", 1),
    ("ByteStorage", "U8", 1),
    ("BoolStorage", "BOOL", 1),
    ("ComplexFloatStorage", "C64", 8),
    ("ComplexDoubleStorage", "C128", 16),
    ("ComplexHalfStorage", "C32", 4),
];

/// A tensor as the pickle describes it; nothing is checked against the file yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    /// The record of the values: `data/KEY`.
    pub key: String,
    /// The dtype as safetensors writes it.
    pub dtype: &'static str,
    /// Bytes of one value.
    pub value_size: usize,
    /// Values in the storage.
    pub storage_len: usize,
    /// Values before the first one.
    pub offset: usize,
    /// Lengths.
    pub shape: Vec<usize>,
    /// Values from one index to the next, for each dimension.
    pub strides: Vec<usize>,
}

/// The named tensors of a pickled state dictionary, in its order. Where the object is a
/// dictionary without tensors, they are looked for under "state_dict", "model" and "module".
pub(super) fn tensors(pickle: &[u8]) -> Result<Vec<(String, Tensor)>> {
    let mut machine = Machine::new(pickle);
    let root = machine.run()?;
    machine.check_nesting()?;
    machine.collect(root)
}

/// A value; containers, storages and tensors by their number in a table.
#[derive(Debug, Clone, Copy)]
enum Value {
    Int(i64),
    /// Bytes of the pickle.
    Str(usize, usize),
    Global(Global),
    Container(usize),
    Storage(usize),
    Tensor(usize),
    /// Numbers, bytes and constants that describe no tensor.
    Other,
}

/// The classes and functions that are known.
#[derive(Debug, Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// Number in [`STORAGES`].
    Storage(usize),
}

enum Container {
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
}

struct Storage {
    kind: usize,
    key: Range<usize>,
    len: usize,
}

struct RawTensor {
    storage: usize,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

struct Machine<'a> {
    pickle: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack at the open marks; no operation but theirs reaches below.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    containers: Vec<Container>,
    storages: Vec<Storage>,
    tensors: Vec<RawTensor>,
}

impl<'a> Machine<'a> {
    fn new(pickle: &'a [u8]) -> Self {
        Self {
            pickle,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            containers: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Runs to STOP; the object pickled.
    fn run(&mut self) -> Result<Value> {
        for _ in 0..MAX_OPS {
            let op = self.take::<1>()?[0];
            if op == b'.' {
                let root = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() {
                    return Err(self.damaged("values are left over"));
                }
                return Ok(root);
            }
            self.step(op)?;
        }
        Err(Error::input(format!("data.pkl has more than {MAX_OPS} operations")))
    }

    /// One opcode; the letters are those of CPython's Lib/pickle.py.
    fn step(&mut self, op: u8) -> Result<()> {
        match op {
            0x80 => self.protocol()?,                            // PROTO
            0x95 => drop(self.take::<8>()?),                     // FRAME
            b'(' => self.marks.push(self.stack.len()),           // MARK
            b'N' | 0x88 | 0x89 => self.stack.push(Value::Other), // NONE, NEWTRUE, NEWFALSE
            b'G' => self.skip(8)?,                               // BINFLOAT
            b'K' => self.push_int::<1>()?,                       // BININT1
            b'M' => self.push_int::<2>()?,                       // BININT2
            b'J' => {
                // BININT
                let n = i32::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(n.into()));
            }
            0x8a => self.push_long::<1>()?,                  // LONG1
            0x8b => self.push_long::<4>()?,                  // LONG4
            0x8c | b'U' => self.push_string::<1>()?,         // SHORT_BINUNICODE, SHORT_BINSTRING
            b'X' | b'T' => self.push_string::<4>()?,         // BINUNICODE, BINSTRING
            0x8d => self.push_string::<8>()?,                // BINUNICODE8
            b'C' => self.push_bytes::<1>()?,                 // SHORT_BINBYTES
            b'B' => self.push_bytes::<4>()?,                 // BINBYTES
            0x8e => self.push_bytes::<8>()?,                 // BINBYTES8
            b'c' => self.global()?,                          // GLOBAL
            0x93 => self.stack_global()?,                    // STACK_GLOBAL
            b'Q' => self.persistent_id()?,                   // BINPERSID
            b'q' => self.put::<1>()?,                        // BINPUT
            b'r' => self.put::<4>()?,                        // LONG_BINPUT
            0x94 => self.memoize()?,                         // MEMOIZE
            b'h' => self.get::<1>()?,                        // BINGET
            b'j' => self.get::<4>()?,                        // LONG_BINGET
            b')' => self.push(Container::Tuple(Vec::new())), // EMPTY_TUPLE
            b']' => self.push(Container::List(Vec::new())),  // EMPTY_LIST
            b'}' => self.push(Container::Dict(Vec::new())),  // EMPTY_DICT
            0x85..=0x87 => self.short_tuple(usize::from(op - 0x84))?, // TUPLE1, TUPLE2, TUPLE3
            b't' => {
                // TUPLE
                let items = self.pop_to_mark()?;
                self.push(Container::Tuple(items));
            }
            b'a' => {
                // APPEND
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                // APPENDS
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                // SETITEM
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            b'u' => {
                // SETITEMS
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'R' => self.reduce()?, // REDUCE
            b'b' => self.build()?,  // BUILD
            _ => {
                return Err(self.damaged(format_args!(
                    "opcode 0x{op:02x}, which torch.save does not write for tensors"
                )));
            }
        }
        Ok(())
    }

    // ---------------------------------------------------------------- bytes and numbers

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.pickle[self.at..].first_chunk::<N>().copied();
        let bytes = bytes.ok_or_else(|| self.damaged("it ends too early"))?;
        self.at += N;
        Ok(bytes)
    }

    /// The next `len` bytes.
    fn range(&mut self, len: u64) -> Result<Range<usize>> {
        let left = self.pickle.len() - self.at;
        let len = usize::try_from(len).ok().filter(|len| *len <= left);
        let len = len.ok_or_else(|| self.damaged("a length beyond its end"))?;
        self.at += len;
        Ok(self.at - len..self.at)
    }

    /// An unsigned little-endian number of `N` bytes.
    fn number<const N: usize>(&mut self) -> Result<u64> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.take::<N>()?);
        Ok(u64::from_le_bytes(wide))
    }

    fn protocol(&mut self) -> Result<()> {
        match self.take::<1>()?[0] {
            2..=5 => Ok(()),
            other => Err(self.damaged(format_args!("pickle protocol {other}"))),
        }
    }

    fn skip(&mut self, len: u64) -> Result<()> {
        self.range(len)?;
        self.stack.push(Value::Other);
        Ok(())
    }

    fn push_int<const N: usize>(&mut self) -> Result<()> {
        let n = self.number::<N>()?;
        self.stack.push(Value::Int(n as i64)); // at most two bytes
        Ok(())
    }

    /// A number of any length, two's complement; one beyond 64 bits describes no tensor.
    fn push_long<const N: usize>(&mut self) -> Result<()> {
        let len = self.number::<N>()?;
        let digits = self.range(len)?;
        let digits = &self.pickle[digits];
        let negative = digits.last().is_some_and(|top| top & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        self.stack.push(match wide.get_mut(..digits.len()) {
            Some(low) => {
                low.copy_from_slice(digits);
                Value::Int(i64::from_le_bytes(wide))
            }
            None => Value::Other,
        });
        Ok(())
    }

    fn push_string<const N: usize>(&mut self) -> Result<()> {
        let len = self.number::<N>()?;
        let range = self.range(len)?;
        self.stack.push(Value::Str(range.start, range.end));
        Ok(())
    }

    fn push_bytes<const N: usize>(&mut self) -> Result<()> {
        let len = self.number::<N>()?;
        self.skip(len)
    }

    /// The text up to the next line feed.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.pickle[self.at..];
        let len = rest.iter().position(|b| *b == b'\n');
        let len = len.ok_or_else(|| self.damaged("it ends too early"))?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| self.damaged("a name that is not UTF-8"))
    }

    // ---------------------------------------------------------------- stack, memo, containers

    fn pop(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.damaged("a value is missing"));
        }
        self.stack.pop().ok_or_else(|| self.damaged("a value is missing"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>> {
        let height = self.marks.pop().ok_or_else(|| self.damaged("a mark is missing"))?;
        Ok(self.stack.split_off(height))
    }

    fn top(&self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let above = self.stack.get(floor..).and_then(<[Value]>::last);
        above.copied().ok_or_else(|| self.damaged("a value is missing"))
    }

    fn push(&mut self, container: Container) {
        self.stack.push(Value::Container(self.containers.len()));
        self.containers.push(container);
    }

    fn put<const N: usize>(&mut self) -> Result<()> {
        let slot = self.number::<N>()? as u32; // at most four bytes
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn memoize(&mut self) -> Result<()> {
        let slot = self.memo.len() as u32; // at most MAX_OPS
        self.memo.insert(slot, self.top()?);
        Ok(())
    }

    fn get<const N: usize>(&mut self) -> Result<()> {
        let slot = self.number::<N>()? as u32; // at most four bytes
        let value = self.memo.get(&slot).copied();
        let value = value.ok_or_else(|| self.damaged("a reference to nothing"))?;
        self.stack.push(value);
        Ok(())
    }

    fn short_tuple(&mut self, len: usize) -> Result<()> {
        let mut items = vec![Value::Other; len];
        for item in items.iter_mut().rev() {
            *item = self.pop()?;
        }
        self.push(Container::Tuple(items));
        Ok(())
    }

    fn append(&mut self, items: Vec<Value>) -> Result<()> {
        match self.top()? {
            Value::Container(id) => match &mut self.containers[id] {
                Container::List(list) => {
                    list.extend(items);
                    Ok(())
                }
                _ => Err(self.damaged("an item for what is no list")),
            },
            _ => Err(self.damaged("an item for what is no list")),
        }
    }

    /// Keys and values in turn.
    fn set_items(&mut self, items: &[Value]) -> Result<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Value::Container(id) if rest.is_empty() => match &mut self.containers[id] {
                Container::Dict(dict) => {
                    dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                    Ok(())
                }
                _ => Err(self.damaged("a key for what is no dictionary")),
            },
            _ => Err(self.damaged("a key for what is no dictionary")),
        }
    }

    fn tuple(&self, value: Value) -> Result<&[Value]> {
        match value {
            Value::Container(id) => match &self.containers[id] {
                Container::Tuple(items) => Ok(items),
                _ => Err(self.damaged("something else where a tuple should be")),
            },
            _ => Err(self.damaged("something else where a tuple should be")),
        }
    }

    fn text(&self, value: Value) -> Option<&'a str> {
        match value {
            Value::Str(start, end) => std::str::from_utf8(&self.pickle[start..end]).ok(),
            _ => None,
        }
    }

    fn size(&self, value: Value) -> Result<usize> {
        match value {
            Value::Int(n) => usize::try_from(n).map_err(|_| self.damaged("a negative size")),
            _ => Err(self.damaged("something else where a size should be")),
        }
    }

    fn sizes(&self, value: Value) -> Result<Vec<usize>> {
        let items = self.tuple(value)?;
        if items.len() > MAX_DIMS {
            return Err(self.damaged(format_args!("a tensor of {} dimensions", items.len())));
        }
        items.iter().map(|item| self.size(*item)).collect()
    }

    // ---------------------------------------------------------------- classes and functions

    fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.push_global(module, name)
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.text(module), self.text(name)) {
            (Some(module), Some(name)) => self.push_global(module, name),
            _ => Err(self.damaged("a class without a name")),
        }
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<()> {
        let storage = |name: &str| STORAGES.iter().position(|(class, ..)| *class == name);
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
            ("torch", name) => storage(name).map(Global::Storage),
            _ => None,
        };
        let Some(known) = known else {
            let what: String = format!("{module}.{name}").chars().take(100).collect();
            return Err(Error::input(format!(
                "data.pkl asks for {what:?}: only tensors are read and nothing is executed. If \
                 you trust the file, load it in Python, save only its state_dict again, or \
                 convert that to safetensors"
            )));
        };
        self.stack.push(Value::Global(known));
        Ok(())
    }

    /// `("storage", class, key, device, values)`: torch/serialization.py, `persistent_id`.
    fn persistent_id(&mut self) -> Result<()> {
        let id = self.pop()?;
        let &[tag, Value::Global(Global::Storage(kind)), Value::Str(start, end), _device, len] =
            self.tuple(id)?
        else {
            return Err(self.damaged("a reference to what is no storage"));
        };
        if self.text(tag) != Some("storage") {
            return Err(self.damaged("a reference to what is no storage"));
        }
        let len = self.size(len)?;
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push(Storage { kind, key: start..end, len });
        Ok(())
    }

    fn reduce(&mut self) -> Result<()> {
        let (args, function) = (self.pop()?, self.pop()?);
        let value = match (function, self.tuple(args)?) {
            (Value::Global(Global::OrderedDict), []) => {
                self.push(Container::Dict(Vec::new()));
                return Ok(());
            }
            // (storage, offset, shape, strides, requires_grad, hooks[, metadata])
            (
                Value::Global(Global::RebuildTensor),
                &[Value::Storage(storage), offset, shape, strides, _, _, ..],
            ) => {
                let tensor = RawTensor {
                    storage,
                    offset: self.size(offset)?,
                    shape: self.sizes(shape)?,
                    strides: self.sizes(strides)?,
                };
                self.tensors.push(tensor);
                Value::Tensor(self.tensors.len() - 1)
            }
            // (tensor, requires_grad, hooks)
            (Value::Global(Global::RebuildParameter), &[tensor @ Value::Tensor(_), _, _]) => tensor,
            _ => return Err(self.damaged("a call that makes no tensor")),
        };
        self.stack.push(value);
        Ok(())
    }

    /// A module's state_dict carries its versions as an attribute, `_metadata`: passed over.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.top()? {
            Value::Container(id) if matches!(self.containers[id], Container::Dict(_)) => Ok(()),
            _ => Err(self.damaged("attributes of what is no dictionary")),
        }
    }

    // ---------------------------------------------------------------- the object

    /// Refuses containers that contain themselves or are nested too deep. Without recursion:
    /// each container is looked at when it is entered and when it is left.
    fn check_nesting(&self) -> Result<()> {
        const ENTERED: u32 = u32::MAX;
        // 0: not seen; ENTERED: open; else containers from here down.
        let mut depth = vec![0_u32; self.containers.len()];
        let mut open = Vec::new();
        for root in 0..self.containers.len() {
            open.push((root, false));
            while let Some((id, is_left)) = open.pop() {
                if is_left {
                    let deepest = self.children(id).map(|child| depth[child]).max().unwrap_or(0);
                    depth[id] = deepest + 1;
                    if depth[id] > MAX_DEPTH {
                        return Err(Error::input(format!(
                            "data.pkl: more than {MAX_DEPTH} containers in each other"
                        )));
                    }
                } else if depth[id] == 0 {
                    depth[id] = ENTERED;
                    open.push((id, true));
                    for child in self.children(id) {
                        match depth[child] {
                            0 => open.push((child, false)),
                            ENTERED => {
                                return Err(Error::input("data.pkl: a container contains itself"));
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The containers directly in container `id`.
    fn children(&self, id: usize) -> impl Iterator<Item = usize> {
        let (items, pairs): (&[Value], &[(Value, Value)]) = match &self.containers[id] {
            Container::Tuple(items) | Container::List(items) => (items, &[]),
            Container::Dict(pairs) => (&[], pairs),
        };
        let in_pairs = pairs.iter().flat_map(|(key, value)| [*key, *value]);
        items.iter().copied().chain(in_pairs).filter_map(|value| match value {
            Value::Container(id) => Some(id),
            _ => None,
        })
    }

    fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match value {
            Value::Container(id) => match &self.containers[id] {
                Container::Dict(pairs) => Some(pairs),
                _ => None,
            },
            _ => None,
        }
    }

    fn collect(&self, root: Value) -> Result<Vec<(String, Tensor)>> {
        let Some(top) = self.dict(root) else {
            return Err(Error::input("the file holds no dictionary of tensors: save a state_dict"));
        };
        let mut tensors = self.named_tensors(top)?;
        for wrapper in ["state_dict", "model", "module"] {
            let inner = top.iter().rfind(|(key, _)| self.text(*key) == Some(wrapper));
            if tensors.is_empty()
                && let Some(inner) = inner.and_then(|(_, value)| self.dict(*value))
            {
                tensors = self.named_tensors(inner)?;
            }
        }
        if tensors.is_empty() {
            return Err(Error::input(
                "the file holds no tensors at its top, nor under \"state_dict\", \"model\" or \
                 \"module\": save a state_dict",
            ));
        }
        Ok(tensors)
    }

    fn named_tensors(&self, pairs: &[(Value, Value)]) -> Result<Vec<(String, Tensor)>> {
        let mut names = HashSet::new();
        let mut tensors = Vec::new();
        for (key, value) in pairs {
            let Value::Tensor(id) = *value else { continue };
            let name = self.text(*key).ok_or_else(|| {
                Error::input("data.pkl: a tensor whose name is not text: save a state_dict")
            })?;
            if !names.insert(name) {
                return Err(Error::input(format!("data.pkl: two tensors are called {name:?}")));
            }
            tensors.push((name.to_string(), self.tensor(id)?));
        }
        Ok(tensors)
    }

    fn tensor(&self, id: usize) -> Result<Tensor> {
        let raw = &self.tensors[id];
        let storage = &self.storages[raw.storage];
        let key = &self.pickle[storage.key.clone()];
        // torch numbers its records; a long key shared by many tensors would be many copies.
        if key.len() > 64 || !key.is_ascii() {
            return Err(Error::input("data.pkl: a storage's key is not a record's name"));
        }
        let (_, dtype, value_size) = STORAGES[storage.kind];
        Ok(Tensor {
            key: String::from_utf8_lossy(key).into_owned(),
            dtype,
            value_size,
            storage_len: storage.len,
            offset: raw.offset,
            shape: raw.shape.clone(),
            strides: raw.strides.clone(),
        })
    }

    fn damaged(&self, what: impl std::fmt::Display) -> Error {
        Error::input(format!("data.pkl, byte {}: {what}: damaged, or no checkpoint?", self.at))
    }
}
