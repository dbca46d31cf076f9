def process_group(*dims):
    raise RuntimeError


def device_mesh(*dims):
    raise RuntimeError
