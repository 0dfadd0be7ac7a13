//! Meta's form against Meta's own published params.json, and against the model it was made of.
