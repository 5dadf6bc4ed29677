//! Work before a request is admitted: bodies, prompts, templates, patterns, archives. Nobody's flood makes another tenant wait.
