from convkit.bench.results import Ceilings


def measure_ceilings(device, dtypes):
    return Ceilings(40e9, 100e9, {d: 800e9 for d in dtypes})
