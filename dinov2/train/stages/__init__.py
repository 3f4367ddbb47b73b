"""Later stages of the method, each an architecture derived from `dinov2.train.ssl_meta_arch.SSLMetaArch`."""
