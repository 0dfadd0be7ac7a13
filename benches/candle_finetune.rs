//! LoRA fine-tuning with candle's own backward: rank 16 on all linear layers of the decode
//! bench's 110M Llama, with stock layers in their differentiable forms, and AdamW.
//! `cargo bench --bench candle_finetune -- MODEL TRAIN.jsonl [f32|bf16] [STEPS] [BATCH] [LENGTH]`
//! prints the loss and tokens/s of each step; without MODEL and TRAIN it makes the models and stops.
//! benches/finetune.sh runs it beside farm and PEFT.

mod support;

use std::path::Path;
use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use candle_nn::{Embedding, Linear, Module, RmsNorm, VarBuilder, loss, ops, rotary_emb};
use support::{SHAPE_110M as SHAPE, random_model};

const RANK: usize = 16;
const SCALE: f64 = 2.0;

/// `W x + scale B (A x)`; A and B are f32, whatever the type of W.
struct LoraLinear {
    frozen: Linear,
    a: Var,
    b: Var,
}

impl LoraLinear {
    fn load(name: &str, inputs: usize, outputs: usize, vb: &VarBuilder) -> Result<Self> {
        let bound = 1.0 / (inputs as f32).sqrt();
        Ok(Self {
            frozen: Linear::new(vb.pp(name).get((outputs, inputs), "weight")?, None),
            a: Var::rand(-bound, bound, (RANK, inputs), vb.device())?,
            b: Var::zeros((outputs, RANK), DType::F32, vb.device())?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let factor = |v: &Var| v.to_dtype(x.dtype()).and_then(|v| v.t());
        let (batch, length, inputs) = x.dims3()?;
        let rows = x.reshape((batch * length, inputs))?;
        let delta = (rows.matmul(&factor(&self.a)?)?.matmul(&factor(&self.b)?)? * SCALE)?;
        self.frozen.forward(x)? + delta.reshape((batch, length, ()))?
    }
}

struct Layer {
    norms: [RmsNorm; 2],
    /// q, k, v, o, gate, up, down.
    linear: [LoraLinear; 7],
}

/// What attention needs beside its inputs.
struct Positions {
    cos: Tensor,
    sin: Tensor,
    /// 0 where a key is seen, minus infinity where it lies ahead.
    mask: Tensor,
}

impl Positions {
    fn new(length: usize, dtype: DType) -> Result<Self> {
        let half = SHAPE.hidden / SHAPE.heads / 2;
        let angle =
            |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
        let angles: Vec<f32> = (0..length * half).map(angle).collect();
        let angles = Tensor::from_vec(angles, (length, half), &Device::Cpu)?;
        let ahead = |i: usize| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f32> = (0..length * length).map(ahead).collect();
        Ok(Self {
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
            mask: Tensor::from_vec(mask, (length, length), &Device::Cpu)?.to_dtype(dtype)?,
        })
    }
}

impl Layer {
    fn load(vb: VarBuilder) -> Result<Self> {
        let (h, i) = (SHAPE.hidden, SHAPE.intermediate);
        let norm = |name| Result::Ok(RmsNorm::new(vb.pp(name).get(h, "weight")?, 1e-5));
        let linear = |name: &str, from, to| LoraLinear::load(name, from, to, &vb);
        Ok(Self {
            norms: [norm("input_layernorm")?, norm("post_attention_layernorm")?],
            linear: [
                linear("self_attn.q_proj", h, h)?,
                linear("self_attn.k_proj", h, h)?,
                linear("self_attn.v_proj", h, h)?,
                linear("self_attn.o_proj", h, h)?,
                linear("mlp.gate_proj", h, i)?,
                linear("mlp.up_proj", h, i)?,
                linear("mlp.down_proj", i, h)?,
            ],
        })
    }

    fn forward(&self, x: &Tensor, at: &Positions) -> Result<Tensor> {
        let [q, k, v, o, gate, up, down] = &self.linear;
        let (batch, length, hidden) = x.dims3()?;
        let heads =
            |y: Tensor| y.reshape((batch, length, SHAPE.heads, ()))?.transpose(1, 2)?.contiguous();
        let y = self.norms[0].forward_diff(x)?;
        let q = rotary_emb::rope_slow(&heads(q.forward(&y)?)?, &at.cos, &at.sin)?;
        let k = rotary_emb::rope_slow(&heads(k.forward(&y)?)?, &at.cos, &at.sin)?;
        let v = heads(v.forward(&y)?)?;
        let scale = 1.0 / ((hidden / SHAPE.heads) as f64).sqrt();
        let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(&at.mask)?;
        let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        let mixed = mixed.transpose(1, 2)?.reshape((batch, length, hidden))?;
        let x = (x + o.forward(&mixed)?)?;
        let y = self.norms[1].forward_diff(&x)?;
        let y = (gate.forward(&y)?.silu()? * up.forward(&y)?)?;
        x + down.forward(&y)?
    }
}

struct Model {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
}

impl Model {
    fn load(dir: &Path, dtype: DType) -> Result<Self> {
        let files = [dir.join("model.safetensors")];
        // SAFETY: nobody rewrites the bench's own model file.
        let vb = unsafe { VarBuilder::from_mmaped_safetensors(&files, dtype, &Device::Cpu)? };
        let vb = vb.pp("model");
        let embedding = vb.pp("embed_tokens").get((SHAPE.vocab, SHAPE.hidden), "weight")?;
        let layer = |i| Layer::load(vb.pp(format!("layers.{i}")));
        Ok(Self {
            embedding: Embedding::new(embedding.clone(), SHAPE.hidden),
            layers: (0..SHAPE.layers).map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::new(vb.pp("norm").get(SHAPE.hidden, "weight")?, 1e-5),
            head: Linear::new(embedding, None),
        })
    }

    fn trained(&self) -> Vec<Var> {
        let linear = self.layers.iter().flat_map(|layer| &layer.linear);
        linear.flat_map(|l| [l.a.clone(), l.b.clone()]).collect()
    }

    /// Mean of -log p of every token but the first; `ids` is `[batch, length]`.
    fn loss(&self, ids: &Tensor, at: &Positions) -> Result<Tensor> {
        let length = ids.dim(1)?;
        let mut x = self.embedding.forward(ids)?;
        for layer in &self.layers {
            x = layer.forward(&x, at)?;
        }
        let x = self.norm.forward_diff(&x)?;
        let logits = self.head.forward(&x.narrow(1, 0, length - 1)?.contiguous()?)?;
        let targets = ids.narrow(1, 1, length - 1)?.flatten_all()?;
        loss::cross_entropy(&logits.flatten_to(1)?.to_dtype(DType::F32)?, &targets)
    }
}

/// The first `length` tokens of each record's text.
fn read(file: &Path, tokenizer: &Path, length: usize) -> Vec<Vec<u32>> {
    let tokenizer = tokenizers::Tokenizer::from_file(tokenizer).unwrap();
    let text = std::fs::read_to_string(file).unwrap();
    let tokens = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let encoding = tokenizer.encode(record["text"].as_str().unwrap(), true).unwrap();
        encoding.get_ids()[..length].to_vec()
    };
    text.lines().map(tokens).collect()
}

fn main() -> Result<()> {
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [dir, train, rest @ ..] = given.as_slice() else {
        for bf16 in [false, true] {
            println!("{}", random_model(SHAPE, bf16).display());
        }
        return Ok(());
    };
    let dtype = if rest.first().is_some_and(|d| d == "bf16") { DType::BF16 } else { DType::F32 };
    let number = |i: usize, or| rest.get(i).map_or(or, |text| text.parse().unwrap());
    let (steps, batch, length) = (number(1, 6), number(2, 4), number(3, 512));
    let dir = Path::new(dir);
    let records = read(Path::new(train), &dir.join("tokenizer.json"), length);
    let model = Model::load(dir, dtype)?;
    let at = Positions::new(length, dtype)?;
    let params = ParamsAdamW { lr: 2e-4, weight_decay: 0.0, ..Default::default() };
    let mut optimizer = AdamW::new(model.trained(), params)?;
    for (step, records) in records.chunks_exact(batch).cycle().take(steps).enumerate() {
        let start = Instant::now();
        let ids = Tensor::from_vec(records.concat(), (batch, length), &Device::Cpu)?;
        let loss = model.loss(&ids, &at)?;
        optimizer.backward_step(&loss)?;
        let rate = (batch * length) as f64 / start.elapsed().as_secs_f64();
        println!("step {step} loss {:.4} tokens/s {rate:.1}", loss.to_scalar::<f32>()?);
    }
    Ok(())
}
