//! From a file to a [`Dataset`].

use std::path::Path;

use super::{Dataset, Formatting};
use crate::{Error, Result};

impl Dataset {
    /// Reads and tokenizes a file.
    pub fn read(path: &Path, _formatting: &Formatting<'_>) -> Result<Self> {
        Err(Error::fault(format!("{}: not written yet", path.display())))
    }
}
