"""The checkpoint's own chat template, which is not trusted: rendered in a sandbox, in a child process under limits."""
