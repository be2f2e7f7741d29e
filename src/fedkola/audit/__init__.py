"""The adversary: what each observer of a run saw, and attacks on exactly that."""
