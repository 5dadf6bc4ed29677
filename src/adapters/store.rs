//! The store: adapter files by digest on disk, and the catalogue of names and versions in SQLite.
