//! Merkle trees over lists, as RFC 9162, section 2.1, defines them: SHA-256, leaves and nodes told apart by their first byte,
//! a list split at the largest power of two below its length. A proof shows that an element is in a list of which only the
//! root is known, without the other elements.

use crate::crypto::{Digest, sha256};

/// The hash of an element.
#[must_use]
pub fn leaf(element: &[u8]) -> Digest {
    sha256(&[&[0], element].concat())
}

fn node(left: &Digest, right: &Digest) -> Digest {
    sha256(&[&[1][..], left, right].concat())
}

/// Where a list of `length` elements, two at least, is split.
const fn split(length: usize) -> usize {
    1 << (length - 1).ilog2()
}

/// The root over the hashes of all elements, in order (RFC 9162, 2.1.1); of an empty list the hash of nothing.
#[must_use]
pub fn root(leaves: &[Digest]) -> Digest {
    match leaves {
        [] => sha256(&[]),
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(split(leaves.len()));
            node(&root(left), &root(right))
        }
    }
}

/// The hashes that lead from an element to the root, the nearest first (RFC 9162, 2.1.3.1); `None` where there is no such
/// element.
#[must_use]
pub fn proof(leaves: &[Digest], index: usize) -> Option<Vec<Digest>> {
    if index >= leaves.len() {
        return None;
    }
    if leaves.len() == 1 {
        return Some(Vec::new());
    }
    let (left, right) = leaves.split_at(split(leaves.len()));
    let (mut path, sibling) =
        if index < left.len() { (proof(left, index)?, right) } else { (proof(right, index - left.len())?, left) };
    path.push(root(sibling));
    Some(path)
}

/// The root to which a proof leads (RFC 9162, 2.1.3.2): the element with this hash is at `index` of a list of `length`
/// elements whose root it is. `None` where the proof is not one for such a place.
#[must_use]
pub fn root_by_proof(leaf: &Digest, index: usize, length: usize, path: &[Digest]) -> Option<Digest> {
    if index >= length {
        return None;
    }
    let Some((last, nearer)) = path.split_last() else { return (length == 1).then_some(*leaf) };
    if length == 1 {
        return None;
    }
    let left = split(length);
    if index < left {
        Some(node(&root_by_proof(leaf, index, left, nearer)?, last))
    } else {
        Some(node(last, &root_by_proof(leaf, index - left, length - left, nearer)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::hex;

    fn leaves(elements: &[&[u8]]) -> Vec<Digest> {
        elements.iter().map(|element| leaf(element)).collect()
    }

    /// The vectors that implementations of Certificate Transparency share.
    #[test]
    fn roots_are_those_of_certificate_transparency() {
        let elements: [&[u8]; 8] = [
            b"",
            b"\x00",
            b"\x10",
            b"\x20\x21",
            b"\x30\x31",
            b"\x40\x41\x42\x43",
            b"\x50\x51\x52\x53\x54\x55\x56\x57",
            b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
        ];
        let roots = [
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        for (count, wanted) in roots.iter().enumerate() {
            assert_eq!(hex(&root(&leaves(&elements[..count]))), *wanted, "{count} elements");
        }
    }

    proptest! {
        #[test]
        fn a_proof_leads_to_the_root_from_its_own_place_and_element_only(length in 1_usize..70, at in 0_usize..70, other in 0_usize..70) {
            let leaves: Vec<Digest> = (0..length).map(|number| leaf(&number.to_be_bytes())).collect();
            let index = at % length;
            let path = proof(&leaves, index).unwrap();
            let root = root(&leaves);
            prop_assert_eq!(root_by_proof(&leaves[index], index, length, &path), Some(root));
            let elsewhere = other % length;
            if elsewhere != index {
                prop_assert_ne!(root_by_proof(&leaves[index], elsewhere, length, &path), Some(root));
                prop_assert_ne!(root_by_proof(&leaves[elsewhere], index, length, &path), Some(root));
            }
            let mut longer = path.clone();
            longer.push(root);
            prop_assert_ne!(root_by_proof(&leaves[index], index, length, &longer), Some(root));
            if let Some((_, shorter)) = path.split_first() {
                prop_assert_ne!(root_by_proof(&leaves[index], index, length, shorter), Some(root));
            }
            for place in 0..path.len() {
                let mut changed = path.clone();
                changed[place][at % 32] ^= 1;
                prop_assert_ne!(root_by_proof(&leaves[index], index, length, &changed), Some(root));
            }
            prop_assert_eq!(proof(&leaves, length), None);
        }
    }
}
