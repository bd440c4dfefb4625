"""``mlx_ifp.benchmark``."""
