/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The kernel types that sockmap.bpf.c touches, and only the fields it touches.
 * libbpf relocates every access against the running kernel's BTF (CO-RE), so
 * what counts here is names and types, not offsets;
 * tests/kernel/test_vmlinux.py checks each of them.
 */
#ifndef SOCKGW_VMLINUX_H
#define SOCKGW_VMLINUX_H

typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

typedef _Bool bool;

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_SOCKHASH = 18,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_F_NO_PREALLOC = 1,
	BPF_F_CLONE = 512,
	BPF_F_MMAPABLE = 1024,
};

enum {
	BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB = 4,
	BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB = 5,
	BPF_SOCK_OPS_RETRANS_CB = 9,
	BPF_SOCK_OPS_STATE_CB = 10,
};

enum {
	BPF_SOCK_OPS_RETRANS_CB_FLAG = 2,
	BPF_SOCK_OPS_STATE_CB_FLAG = 4,
};

enum {
	BPF_TCP_CLOSE = 7,
};

enum sk_action {
	SK_DROP = 0,
	SK_PASS = 1,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct bpf_sock;

struct __sk_buff {
	__u32 len;
	__u32 cb[5];
	union {
		struct bpf_sock *sk;
	};
};

struct bpf_sock_ops {
	__u32 op;
	__u32 args[4];
	__u32 srtt_us;
	__u32 total_retrans;
	union {
		struct bpf_sock *sk;
	};
};

struct sock {
	int sk_wmem_queued;
	int sk_sndbuf;
};

struct tcp_sock {
	__u32 copied_seq;
	__u32 write_seq;
};

#pragma clang attribute pop

#endif
