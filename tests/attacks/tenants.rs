//! What two tenants share, one of them greedy: the other keeps its share.
