//! Which rows of a step each adapter answers.

use std::collections::BTreeMap;

use crate::model::batch::StepBatch;

/// The rows of one adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRows {
    /// The adapter's number.
    pub adapter: usize,
    /// Rows, in order.
    pub rows: Vec<usize>,
}

/// The adapters of a step's rows; empty where no row has one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowAdapters {
    of_row: Vec<Option<u32>>,
    groups: Vec<AdapterRows>,
}

impl RowAdapters {
    /// Those of a batch.
    pub fn new(batch: &StepBatch) -> Self {
        if batch.sequences.iter().all(|s| s.adapter.is_none()) {
            return Self::default();
        }
        let rows =
            batch.sequences.iter().flat_map(|s| std::iter::repeat_n(s.adapter, s.num_tokens));
        Self::of_rows(rows.collect())
    }

    /// Those of the rows `rows`, which come one after another.
    pub fn among(&self, rows: &[usize]) -> Self {
        match self.of_row.is_empty() {
            true => Self::default(),
            false => Self::of_rows(rows.iter().map(|row| self.of_row[*row]).collect()),
        }
    }

    /// The rows of each adapter that has some.
    pub fn groups(&self) -> &[AdapterRows] {
        &self.groups
    }

    fn of_rows(of_row: Vec<Option<u32>>) -> Self {
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (row, adapter) in of_row.iter().enumerate() {
            if let Some(adapter) = adapter {
                groups.entry(*adapter as usize).or_default().push(row);
            }
        }
        let groups = groups.into_iter().map(|(adapter, rows)| AdapterRows { adapter, rows });
        Self { groups: groups.collect(), of_row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_adapter_and_found_again_in_a_selection() {
        let all = RowAdapters::of_rows(vec![Some(2), None, Some(0), Some(2)]);
        let group = |adapter, rows: &[usize]| AdapterRows { adapter, rows: rows.to_vec() };
        assert_eq!(all.groups(), [group(0, &[2]), group(2, &[0, 3])]);
        assert_eq!(all.among(&[1, 3]).groups(), [group(2, &[1])]);
        assert_eq!(RowAdapters::default().among(&[5]), RowAdapters::default());
    }
}
