/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The C that Python cannot be: a va_list callback, a callback for each ring
 * record, memory barriers, and a session paired in one call without the
 * interpreter lock. cdef.h declares these same functions to cffi.
 */
#ifndef SOCKGW_SHIM_H
#define SOCKGW_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/types.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include "sockmap.h"
#include "direct.h"
#include "cdef.h"

/* Close every descriptor of this process but these, which are sorted; below 0: none. */
void sgw_close_all_but(int *kept, size_t count);

#endif
