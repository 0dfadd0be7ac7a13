//! Cross-entropy over the vocabulary on a device, some rows at a time; see
//! [`crate::train::loss`]. Where the vocabulary is split over a group, its ranks exchange three
//! numbers a row through the host.

use std::ops::Range;

use super::linear::{InputGradient, Linear};
use super::{Pass, Place};
use crate::Result;
use crate::device::Array;
use crate::device::train::{self as kernel, Logits, Rows};
use crate::train::loss::{Everyones, LossHead as HostHead, RowSums};
use crate::train::parameters::Parameters;

/// Logits that are held at once: enough rows for large products of the widest vocabularies.
const LOGITS_AT_ONCE: usize = 64 << 20;

/// Blocks that a grid can have in its second direction.
const MAX_GRID: usize = 65_535;

/// Rows whose logits over `ids` tokens are held at once.
pub fn rows_at_once(ids: usize) -> usize {
    (LOGITS_AT_ONCE / ids.max(1)).clamp(1, MAX_GRID)
}

/// The way from the last hidden states to the loss.
pub struct LossHead {
    /// `[ids, hidden]`, this rank's.
    pub linear: Linear,
    ids: Range<usize>,
    softcap: Option<f32>,
}

/// What is summed over the rows.
pub struct Loss {
    /// Σ −ln p(target).
    pub sum: f64,
    /// The gradient of the sum, f32 `[rows, hidden]`, if it was asked for.
    pub dx: Option<Array>,
}

impl LossHead {
    /// The host's.
    ///
    /// # Errors
    /// No memory on the device.
    pub fn new(place: &Place, from: &HostHead, parameters: &Parameters) -> Result<Self> {
        let linear = Linear::new(place, &from.linear, parameters)?;
        Ok(Self { linear, ids: from.ids.clone(), softcap: from.softcap })
    }

    /// The loss of predicting `targets` from the rows `x`, which are normed; with what the rows'
    /// draws are keyed by, the gradient too. Collective.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn run(
        &self,
        pass: &Pass,
        x: &Array,
        targets: &[u32],
        numbers: Option<Vec<u64>>,
    ) -> Result<Loss> {
        let (place, device) = (pass.place, pass.device());
        let dx = numbers.as_ref().map(|_| place.floats(x.len())).transpose()?;
        let ids: Vec<i32> = targets.iter().map(|id| *id as i32).collect();
        let on_device = device.upload(&ids)?;
        let numbers = numbers.map(|numbers| device.upload(&numbers)).transpose()?;
        let sums = place.floats(3 * targets.len())?;
        let step = rows_at_once(self.ids.len());
        for first in (0..targets.len()).step_by(step) {
            let chunk = Chunk {
                rows: first..(first + step).min(targets.len()),
                all: targets.len(),
                numbers: numbers.as_ref(),
            };
            let targets = on_device.slice(chunk.rows.clone());
            self.chunk(pass, &chunk, x, &targets, &sums, dx.as_ref())?;
        }
        if let Some(dx) = &dx {
            place.sum(dx)?;
        }
        let all = Everyones(RowSums::of(&device.read::<f32>(&sums)?));
        Ok(Loss { sum: (0..targets.len()).map(|row| all.loss(row)).sum(), dx })
    }

    /// The sums of some rows, and with `dx` their gradients.
    fn chunk(
        &self,
        pass: &Pass,
        chunk: &Chunk,
        x: &Array,
        targets: &Array,
        sums: &Array,
        dx: Option<&Array>,
    ) -> Result<()> {
        let (place, device, ids) = (pass.place, pass.device(), self.ids.len());
        let (x, sums) = (chunk.of(x), chunk.of(sums));
        let numbers = chunk.numbers.map(|numbers| chunk.of(numbers));
        let values = place.floats(chunk.rows.len() * ids)?;
        let kept = self.linear.forward(pass, &x, numbers.as_ref(), &Rows::new(&values, ids))?;
        let logits =
            Logits { values: &values, targets, first_id: self.ids.start, softcap: self.softcap };
        kernel::loss_sums(device, &logits, &sums)?;
        if place.comm.size() > 1 {
            exchange(place, &sums)?;
        }
        let Some(dx) = dx else { return Ok(()) };
        let d = if values.dtype() == place.dtype {
            values.clone()
        } else {
            place.values(values.len())?
        };
        kernel::loss_gradient(device, &logits, &sums, &d)?;
        let dx = chunk.of(dx);
        let to = Some(InputGradient { values: &dx, is_added: false });
        self.linear.backward(pass, &x, &kept, &Rows::new(&d, ids), numbers.as_ref(), to)
    }
}

/// Some of all rows.
struct Chunk<'a> {
    rows: Range<usize>,
    all: usize,
    numbers: Option<&'a Array>,
}

impl Chunk<'_> {
    /// Their part of a matrix of all rows.
    fn of(&self, matrix: &Array) -> Array {
        let width = matrix.len() / self.all;
        matrix.slice(self.rows.start * width..self.rows.end * width)
    }
}

/// This rank's sums become those over the whole vocabulary. Collective.
fn exchange(place: &Place, sums: &Array) -> Result<()> {
    let all = place.floats(place.comm.size() * sums.len())?;
    place.comm.all_gather(&place.device, sums, &all)?;
    let all = Everyones::joined(&place.device.read::<f32>(&all)?, sums.len() / 3);
    place.device.write(sums, &all.flat())
}
