"""``mlx_ifp.plot``."""
