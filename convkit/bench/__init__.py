"""Problems, and what is measured on them. Needs nothing but torch."""
