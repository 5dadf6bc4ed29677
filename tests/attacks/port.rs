//! The port of an open server and of one with keys: connections, hosts, origins, log lines.
