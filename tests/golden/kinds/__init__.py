"""The kinds of golden files that are known, a module each.

A kind has

    NAME = "awd_lstm"

    def matches(names: set[str], config: dict) -> bool:
        '''Whether a file with these arrays and this config is of this kind.'''

    def compare(arrays: Mapping[str, np.ndarray], config: dict, dtype) -> Comparison:
        '''What we compute for it, see ../comparison.py.'''

The name of the file says nothing. `arrays` has no config, and its floating arrays are
in `dtype`, the precision to compute in (float64 with jax.enable_x64, or float32);
the tolerances follow from what the file itself stores. A UserError refuses the file.

A kind of folders (with an expected.npz) has these two instead, or besides:

    def matches_folder(folder: pathlib.Path) -> bool
    def compare_folder(folder: pathlib.Path, arrays, config, dtype) -> Comparison
"""
