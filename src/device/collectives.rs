//! Sums and gathers over a tensor-parallel group of arrays on devices.
//!
//! [`HostStaged`] takes them through the host's memory and the group's own messages: slow, but it
//! works between any two ranks, also two on one device. NCCL (feature `nccl`) goes from
//! device to device.

use std::sync::Arc;

use super::{Array, Device, Dtype};
use crate::Result;
use crate::comm::TensorComm;

/// What tensor-parallel layers on devices need from their group.
pub trait DeviceComm: Send + Sync {
    /// This rank in the group.
    fn rank(&self) -> usize;
    /// Ranks of the group.
    fn size(&self) -> usize;
    /// f32 values become their sums over the ranks; lengths must agree.
    ///
    /// # Errors
    /// A fault of the device or of the library between them.
    fn all_reduce_sum(&self, device: &Device, values: &Array) -> Result<()>;
    /// The ranks' f32 `local`, as many on each, one after another in `all`.
    ///
    /// # Errors
    /// See [`DeviceComm::all_reduce_sum`].
    fn all_gather(&self, device: &Device, local: &Array, all: &Array) -> Result<()>;
    /// Whether [`Device::capture`] can record these.
    fn can_be_captured(&self) -> bool;
}

/// Through the host, in rank order.
pub struct HostStaged(Arc<dyn TensorComm>);

impl HostStaged {
    /// Over a group's messages.
    pub fn new(comm: Arc<dyn TensorComm>) -> Self {
        Self(comm)
    }
}

impl DeviceComm for HostStaged {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn all_reduce_sum(&self, device: &Device, values: &Array) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let mut host = device.read::<f32>(values)?;
        self.0.all_reduce_sum(&mut host);
        device.write(values, &host)
    }

    fn all_gather(&self, device: &Device, local: &Array, all: &Array) -> Result<()> {
        if self.size() == 1 {
            return device.copy(local, all);
        }
        let host = device.read::<f32>(local)?;
        device.write(all, &self.0.all_gather(&host))
    }

    fn can_be_captured(&self) -> bool {
        self.size() == 1
    }
}

/// Rows of logits from the ranks' shares of the vocabulary: `gathered` is `[size][rows][widest
/// share]`, `out` becomes `[rows][vocab]`.
///
/// # Errors
/// A fault of the driver.
///
/// # Panics
/// If the arrays are too short.
pub fn join_shares(
    device: &Device,
    gathered: &Array,
    [size, rows, vocab]: [usize; 3],
    out: &Array,
) -> Result<()> {
    let widest = vocab.div_ceil(size);
    assert!(gathered.dtype() == Dtype::F32 && out.dtype() == Dtype::F32);
    assert!(gathered.len() >= size * rows * widest && out.len() >= rows * vocab);
    let grid = [super::blocks(vocab, 256), rows as u32, 1];
    let arguments = [gathered.into(), size.into(), rows.into(), vocab.into(), out.into()];
    device.launch("join_shares", grid, [256, 1, 1], 0, &arguments)
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::comm::{HostTensorComm, LocalComm};
    use crate::model::layers::share;

    #[test]
    fn sums_and_logits_come_together_over_uneven_shares() {
        let (rows, vocab) = (3, 11_usize);
        for size in [1, 2, 4] {
            let outputs = LocalComm::run(size, |comm| {
                let (rank, device) = (comm.rank(), Device::emulated());
                let comm = HostStaged::new(Arc::new(HostTensorComm::new(comm)));
                let sum = device.upload(&[1.0f32, rank as f32]).unwrap();
                comm.all_reduce_sum(&device, &sum).unwrap();
                let widest = vocab.div_ceil(size);
                let mine = share(vocab, rank, size);
                let mut local = vec![f32::NAN; rows * widest];
                for row in 0..rows {
                    for (i, id) in mine.clone().enumerate() {
                        local[row * widest + i] = (row * vocab + id) as f32;
                    }
                }
                let local = device.upload(&local).unwrap();
                let all = device.array(Dtype::F32, size * rows * widest).unwrap();
                comm.all_gather(&device, &local, &all).unwrap();
                let out = device.array(Dtype::F32, rows * vocab).unwrap();
                join_shares(&device, &all, [size, rows, vocab], &out).unwrap();
                (device.read::<f32>(&sum).unwrap(), device.read::<f32>(&out).unwrap())
            });
            let ranks_sum = (size * (size - 1) / 2) as f32;
            let whole: Vec<f32> = (0..rows * vocab).map(|i| i as f32).collect();
            for (sum, out) in outputs {
                assert_eq!(sum, [size as f32, ranks_sum]);
                assert_eq!(out, whole);
            }
        }
    }
}
