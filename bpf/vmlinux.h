/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The kernel types that sockmap.bpf.c touches, and only the fields it touches.
 * libbpf relocates every access against the running kernel's BTF (CO-RE), so
 * what counts here is names and types, not offsets;
 * tests/kernel/test_vmlinux.py checks each of them.
 */
#ifndef SOCKGW_VMLINUX_H
#define SOCKGW_VMLINUX_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

typedef _Bool bool;

enum {
	false = 0,
	true = 1,
};

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_SOCKHASH = 18,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_NOEXIST = 1,
	BPF_SK_STORAGE_GET_F_CREATE = 1,
	BPF_F_INGRESS = 1,
};

enum {
	BPF_F_NO_PREALLOC = 1,
	BPF_F_CLONE = 512,
	BPF_F_MMAPABLE = 1024,
};

enum {
	BPF_F_PSEUDO_HDR = 16,
	BPF_F_CURRENT_NETNS = -1,
};

enum bpf_check_mtu_flags {
	BPF_MTU_CHK_SEGS = 1,
};

enum {
	TC_ACT_UNSPEC = -1,
	TC_ACT_SHOT = 2,
};

enum {
	TCP_ESTABLISHED = 1,
	TCP_FIN_WAIT1 = 4,
	TCP_FIN_WAIT2 = 5,
};

enum sock_flags {
	SOCK_ZEROCOPY = 18,
};

enum {
	XFRM_POLICY_IN = 0,
	XFRM_POLICY_OUT = 1,
};

enum {
	BPF_SOCK_OPS_TIMEOUT_INIT = 1,
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
	BPF_TCP_FIN_WAIT1 = 4,
	BPF_TCP_CLOSE = 7,
	BPF_TCP_LAST_ACK = 9,
};

enum sk_action {
	SK_DROP = 0,
	SK_PASS = 1,
};

/* Shared with userspace as it is: not relocated. */
struct bpf_spin_lock {
	__u32 val;
};

struct bpf_sock_tuple {
	union {
		struct {
			__be32 saddr;
			__be32 daddr;
			__be16 sport;
			__be16 dport;
		} ipv4;
		struct {
			__be32 saddr[4];
			__be32 daddr[4];
			__be16 sport;
			__be16 dport;
		} ipv6;
	};
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct bpf_sock;

struct __sk_buff {
	__u32 len;
	__u32 protocol;
	__u32 vlan_present;
	__u32 ifindex;
	__u32 cb[5];
	union {
		struct bpf_sock *sk;
	};
};

struct bpf_sock_ops {
	__u32 op;
	__u32 args[4];
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 is_fullsock;
	__u32 srtt_us;
	__u32 bpf_sock_ops_cb_flags;
	__u32 total_retrans;
	union {
		struct bpf_sock *sk;
	};
};

struct sk_msg_md {
	__u32 size;
	union {
		struct bpf_sock *sk;
	};
};

struct list_head {
	struct list_head *next;
};

struct bpf_prog;

struct sk_psock_progs {
	struct bpf_prog *msg_parser;
	struct bpf_prog *stream_parser;
	struct bpf_prog *stream_verdict;
	struct bpf_prog *skb_verdict;
};

struct sk_psock {
	struct sk_psock_progs progs;
	struct list_head ingress_msg;
};

struct proto {
	unsigned long *memory_pressure;
};

struct net_device {
	int ifindex;
};

struct xfrm_policy;
struct xfrm_state;

struct netns_xfrm {
	__u32 policy_count[6]; /* 3 directions, then the same for sockets' own */
};

struct net {
	struct netns_xfrm xfrm;
};

struct dst_entry {
	struct net_device *dev;
	struct xfrm_state *xfrm;
};

struct file {
	unsigned int f_flags;
};

struct socket {
	struct file *file;
};

struct sock_common {
	unsigned short skc_family;
	volatile unsigned char skc_state;
	struct {
		struct net *net;
	} skc_net;
	struct proto *skc_prot;
	struct {
		__s64 counter;
	} skc_cookie;
	union {
		unsigned long skc_flags;
	};
};

struct sock {
	struct sock_common __sk_common;
	__s32 sk_peek_off;
	struct {
		struct {
			int counter;
		} rmem_alloc;
		int len;
	} sk_backlog;
	int sk_rcvlowat;
	struct dst_entry *sk_dst_cache;
	struct xfrm_policy *sk_policy[2];
	int sk_wmem_queued;
	int sk_sndbuf;
	void *sk_user_data;
	struct socket *sk_socket;
};

struct rb_node;

struct rb_root {
	struct rb_node *rb_node;
};

struct tcp_options_received {
	__u32 ts_recent;
	__u16 mss_clamp;
};

struct inet_connection_sock {
	__u32 icsk_pmtu_cookie;
};

struct request_sock;

struct tcp_sock {
	__u32 copied_seq;
	__u32 write_seq;
	__u32 rcv_nxt;
	__u32 rcv_wup;
	__u32 rcv_wnd;
	__u32 rcv_ssthresh;
	__u32 mss_cache;
	__u32 snd_wnd;
	__u32 snd_una;
	__u32 tsoffset;
	__u64 bytes_received;
	__u64 bytes_acked;
	__u16 advmss;
	__u8 ecn_flags;
	struct rb_root out_of_order_queue;
	struct tcp_options_received rx_opt;
	struct request_sock *fastopen_rsk;
};

#pragma clang attribute pop

#endif
