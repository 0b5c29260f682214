"""A fleet on paper: requests arrive, a policy picks the replica of each, replicas serve them as the engine does, in the
times that a real one took. docs/scale.md says what is on paper and what is not."""
