//! A projection on the device: one matrix, or several side by side, a bias, and what
//! adapters add.
//!
//! Adapters are applied as [`crate::model::adapter`] has it: the rows of each are gathered, go
//! through its factors, and are added where they came from.

use super::upload::Uploader;
use crate::Result;
use crate::device::linear::{Matrix, linear, scratch_bytes};
use crate::device::{Array, Device, Dtype, ops};
use crate::model::adapter::Deltas;
use crate::model::layers::{ColumnParallelLinear, RowParallelLinear};
use crate::model::weights::Weight;

/// The rows of a step that one adapter answers.
pub struct AdapterGroup {
    /// The adapter's number.
    pub adapter: usize,
    /// i32.
    pub rows: Array,
}

/// What a projection needs besides its input.
pub struct Context<'a> {
    /// The device.
    pub device: &'a Device,
    /// Scratch memory, see [`Linear::scratch_bytes`].
    pub scratch: &'a Array,
    /// The rows' adapters.
    pub adapters: &'a [AdapterGroup],
}

/// A matrix from rows of features to rows of features.
pub struct Linear {
    parts: Vec<Part>,
    outputs: usize,
    bias: Option<Array>,
    deltas: Vec<Delta>,
}

struct Part {
    matrix: Matrix,
    first_output: usize,
}

/// What one adapter changes at some of the outputs.
struct Delta {
    adapter: usize,
    first_output: usize,
    outputs: usize,
    replaced: Option<Matrix>,
    low_rank: Option<LowRank>,
    bias: Option<Array>,
}

struct LowRank {
    a: Matrix,
    b: Matrix,
    scale: f32,
    gains: Option<Array>,
}

/// A layer's parts as the host has them.
struct Host<'a> {
    weight: &'a Weight,
    bias: Option<&'a [f32]>,
    deltas: &'a Deltas,
}

impl Linear {
    /// These layers side by side: their outputs one after another.
    ///
    /// # Errors
    /// No memory; a fault of the driver.
    pub fn columns(uploader: &Uploader, layers: &[&ColumnParallelLinear]) -> Result<Self> {
        let hosts = layers.iter().map(|layer| Host {
            weight: layer.weight(),
            bias: layer.bias.as_deref(),
            deltas: &layer.deltas,
        });
        Self::load(uploader, &hosts.collect::<Vec<_>>())
    }

    /// One layer of which this rank has some inputs.
    ///
    /// # Errors
    /// See [`Linear::columns`].
    pub fn row(uploader: &Uploader, layer: &RowParallelLinear) -> Result<Self> {
        let (weight, bias) = (layer.weight(), layer.bias.as_deref());
        Self::load(uploader, &[Host { weight, bias, deltas: &layer.deltas }])
    }

    /// A matrix that is on the device already, with what adapters add to it.
    ///
    /// # Errors
    /// See [`Linear::columns`].
    pub fn of_matrix(uploader: &Uploader, matrix: Matrix, deltas: &Deltas) -> Result<Self> {
        let outputs = matrix.rows();
        Ok(Self {
            parts: vec![Part { matrix, first_output: 0 }],
            outputs,
            bias: None,
            deltas: load_deltas(uploader, deltas, 0, outputs, None)?,
        })
    }

    fn load(uploader: &Uploader, layers: &[Host]) -> Result<Self> {
        let weights: Vec<&Weight> = layers.iter().map(|layer| layer.weight).collect();
        let mut outputs = 0;
        let mut parts = Vec::new();
        for matrix in uploader.stacked(&weights)? {
            let first_output = outputs;
            outputs += matrix.rows();
            parts.push(Part { matrix, first_output });
        }
        let bias = match layers.iter().any(|layer| layer.bias.is_some()) {
            true => {
                let of = |layer: &Host| match layer.bias {
                    Some(bias) => bias.to_vec(),
                    None => vec![0.0; layer.weight.rows()],
                };
                let all: Vec<f32> = layers.iter().flat_map(of).collect();
                Some(uploader.vector(&all)?)
            }
            false => None,
        };
        let mut deltas = Vec::new();
        let mut first = 0;
        for layer in layers {
            let rows = layer.weight.rows();
            deltas.extend(load_deltas(uploader, layer.deltas, first, rows, layer.bias)?);
            first += rows;
        }
        Ok(Self { parts, outputs, bias, deltas })
    }

    /// Output features.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes that a product streams.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.matrix.bytes()).sum()
    }

    /// Whether an adapter changes it.
    pub fn is_adapted(&self) -> bool {
        !self.deltas.is_empty()
    }

    /// Scratch memory for `rows` rows of `dtype`.
    pub fn scratch_bytes(&self, dtype: Dtype, rows: usize) -> usize {
        let most = |matrix: &Matrix| {
            // Fewer rows may take another way, with other needs.
            [rows, rows.min(16), 1].map(|m| scratch_bytes(matrix, dtype, m)).into_iter().max()
        };
        let low_rank = self.deltas.iter().flat_map(|delta| &delta.low_rank);
        let replaced = self.deltas.iter().flat_map(|delta| &delta.replaced);
        let adapters = low_rank.flat_map(|low_rank| [&low_rank.a, &low_rank.b]).chain(replaced);
        let all = self.parts.iter().map(|part| &part.matrix).chain(adapters);
        all.filter_map(most).max().unwrap_or(0)
    }

    /// `out = x · Wᵀ + bias`, and what adapters make of it; `out` is `[rows, out_stride]` of
    /// which the first [`Linear::outputs`] columns are written.
    ///
    /// # Errors
    /// A fault of the driver; no memory for adapters' rows.
    pub fn forward(
        &self,
        context: &Context,
        x: &Array,
        out: &Array,
        out_stride: usize,
    ) -> Result<()> {
        self.products(context, x, out, out_stride, 0.0)?;
        if let Some(bias) = &self.bias {
            assert_eq!(out_stride, self.outputs, "rows with a bias lie side by side");
            ops::add_bias(context.device, out, bias)?;
        }
        for group in context.adapters {
            let mine = self.deltas.iter().filter(|delta| delta.adapter == group.adapter);
            for delta in mine {
                delta.apply(context, x, &group.rows, out, out_stride)?;
            }
        }
        Ok(())
    }

    /// `out += x · Wᵀ + bias`, without adapters.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn accumulate(&self, context: &Context, x: &Array, out: &Array) -> Result<()> {
        self.products(context, x, out, self.outputs, 1.0)?;
        match &self.bias {
            Some(bias) => ops::add_bias(context.device, out, bias),
            None => Ok(()),
        }
    }

    fn products(
        &self,
        context: &Context,
        x: &Array,
        out: &Array,
        out_stride: usize,
        beta: f32,
    ) -> Result<()> {
        for Part { matrix, first_output } in &self.parts {
            let out = out.slice((*first_output).min(out.len())..out.len());
            linear(context.device, x, matrix, &out, out_stride, beta, context.scratch)?;
        }
        Ok(())
    }
}

fn load_deltas(
    uploader: &Uploader,
    deltas: &Deltas,
    first_output: usize,
    outputs: usize,
    bias: Option<&[f32]>,
) -> Result<Vec<Delta>> {
    let mut loaded = Vec::new();
    for (adapter, delta) in deltas.0.iter().enumerate() {
        let Some(delta) = delta else { continue };
        let matrix = |weight: &Weight| uploader.matrix(weight);
        let low_rank = delta.low_rank.as_ref().map(|low_rank| -> Result<LowRank> {
            Ok(LowRank {
                a: matrix(&low_rank.a)?,
                b: matrix(&low_rank.b)?,
                scale: low_rank.scale,
                gains: low_rank.gains.as_deref().map(|g| uploader.vector(g)).transpose()?,
            })
        });
        loaded.push(Delta {
            adapter,
            first_output,
            outputs,
            replaced: delta.replaced.as_ref().map(matrix).transpose()?,
            low_rank: low_rank.transpose()?,
            bias: bias.map(|bias| uploader.vector(bias)).transpose()?,
        });
    }
    Ok(loaded)
}

impl Delta {
    fn apply(
        &self,
        context: &Context,
        x: &Array,
        rows: &Array,
        out: &Array,
        out_stride: usize,
    ) -> Result<()> {
        let Context { device, scratch, .. } = *context;
        let inputs = self.inputs();
        let Some(inputs) = inputs else { return Ok(()) };
        let (count, width) = (rows.len(), self.outputs);
        let mine = device.uninitialised(x.dtype(), count * inputs)?;
        ops::gather_rows(device, x, rows, &mine)?;
        let product = |matrix: &Matrix, x: &Array, dtype: Dtype| -> Result<Array> {
            let out = device.uninitialised(dtype, count * matrix.rows())?;
            linear(device, x, matrix, &out, matrix.rows(), 0.0, scratch)?;
            Ok(out)
        };
        let replaced = self.replaced.as_ref();
        let replaced = replaced.map(|w| product(w, &mine, Dtype::F32)).transpose()?;
        let added = match &self.low_rank {
            Some(LowRank { a, b, scale, .. }) => {
                let inner = product(a, &mine, x.dtype())?;
                ops::scale(device, &inner, *scale)?;
                Some(product(b, &inner, Dtype::F32)?)
            }
            None => None,
        };
        let gains = self.low_rank.as_ref().and_then(|low_rank| low_rank.gains.as_ref());
        let kernel = match out.dtype() {
            Dtype::F16 => "adapter_rows_f16",
            Dtype::Bf16 => "adapter_rows_bf16",
            _ => "adapter_rows_f32",
        };
        let out = out.slice(self.first_output..out.len());
        let arguments = [
            rows.into(),
            count.into(),
            width.into(),
            replaced.as_ref().into(),
            added.as_ref().into(),
            gains.into(),
            self.bias.as_ref().into(),
            (&out).into(),
            out_stride.into(),
        ];
        let grid = [crate::device::blocks(width, 256), count as u32, 1];
        device.launch(kernel, grid, [256, 1, 1], 0, &arguments)
    }

    /// Input features; `None` where it changes nothing.
    fn inputs(&self) -> Option<usize> {
        let low_rank = self.low_rank.as_ref().map(|low_rank| low_rank.a.cols());
        low_rank.or(self.replaced.as_ref().map(Matrix::cols))
    }
}
