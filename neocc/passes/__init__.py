"""Program-to-program passes."""
